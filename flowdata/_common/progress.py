"""Progress: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

_LINE_EVERY = 30.0  # seconds between plain lines
_FIRST_LINE = 3.0  # seconds between them until one has told how long the work will take
_ADVANCES, _SHARE = 3, 0.05  # of which either is enough to tell it


class Advance(Protocol):
    """Moves a progress display on by a number of units."""

    def __call__(self, amount: int, /) -> None: ...


@contextmanager
def progress_bar(
    total: int,
    name: str,
    unit: str,
    *,
    initial: int = 0,
    shown: bool = True,
    patient: bool = False,
) -> Iterator[Advance]:
    """Show the progress of a piece of work; the context is a function that moves the display on.

    Args:
        total: number of units in the whole work.
        name: what is done and for whom, in a few words, at the beginning of each line: a log holds
            those of others as well.
        unit: the unit's name, in the plural.
        initial: number of units that an earlier run has done; the share includes them, the speed
            does not.
        shown: False shows nothing.
        patient: show nothing of work that ends within a few seconds, as of what is done again and
            again and is long only where models are large.
    """
    if not shown:
        yield lambda amount, /: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            total=total,
            initial=initial,
            desc=name,
            unit=f" {unit}",
            unit_scale=total > 9999,
            delay=_FIRST_LINE if patient else 0,
        ) as bar:
            yield lambda amount, /: (bar.update(amount), None)[1]
    else:
        lines = _Lines(total, name, unit, initial)
        yield lines.advance
        if not patient or lines.written >= 0:
            lines.end()


class _Lines:
    """Plain lines, one in half a minute: in a log file every step of a bar would be a line.

    They come sooner until one has told how much time is left. What comes before the first advance,
    such as compiling or starting workers, comes once: the speed leaves it out.
    """

    def __init__(self, total: int, name: str, unit: str, initial: int) -> None:
        self.total, self.name, self.unit = total, name, unit
        self.position = initial
        self.last_time = monotonic()
        self.advances = 0
        self.first = (initial, self.last_time)  # position and time that the speed counts from
        self.pause = _FIRST_LINE
        self.written = -1  # the position that the last line told of

    def advance(self, amount: int, /) -> None:
        self.position += amount
        self.advances += 1
        now = monotonic()
        if self.advances == 1 and self.position < self.total:
            self.first = (self.position, now)
        if now - self.last_time > self.pause:
            self.write()

    def end(self) -> None:
        if self.position != self.written:
            self.write()

    def write(self) -> None:
        self.last_time, self.written = monotonic(), self.position
        share = self.position / max(self.total, 1)
        line = f"{self.name}: {self.position:,} of {self.total:,} {self.unit} ({share:.0%})"
        position, time = self.first
        rate = (self.position - position) / max(self.last_time - time, 1e-9)
        if rate > 0:
            line += f", {rate:,.0f}/s" if rate >= 10 else f", {rate:.2g}/s"
        left = self.total - self.position
        if rate > 0 and left > 0 and (self.advances >= _ADVANCES or share >= _SHARE):
            line += f", {duration(left / rate)} left"
            self.pause = _LINE_EVERY
        print(line, file=sys.stderr, flush=True)


def duration(seconds: float) -> str:
    """Return a time for a reader, who plans with it and needs no exact one.

    Example:
        >>> duration(8.2), duration(250), duration(7400), duration(300_000)
        ('8 s', '4 min', '2 h 3 min', '3 d 11 h')
    """
    if seconds < 60:
        return f"{seconds:.0f} s"
    minutes = round(seconds / 60)
    if minutes < 60:
        return f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    if hours < 24:
        return f"{hours} h {minutes} min"
    return f"{hours // 24} d {hours % 24} h"
