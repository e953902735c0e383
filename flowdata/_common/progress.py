"""Telling the user: a bar on a terminal, plain lines in a log."""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from time import monotonic
from typing import Protocol

_LINE_EVERY = 30.0  # seconds between plain lines


class Advance(Protocol):
    """Moves a progress display on by a number of units."""

    def __call__(self, amount: int, /) -> None: ...


@contextmanager
def progress_bar(
    total: int, what: str, unit: str, *, done: int = 0, shown: bool = True
) -> Iterator[Advance]:
    """Show how far a piece of work is; gives the function that moves it on."""
    if not shown:
        yield lambda amount, /: None
    elif sys.stderr.isatty():
        from tqdm import tqdm

        with tqdm(
            total=total, initial=done, desc=what, unit=f" {unit}", unit_scale=total > 9999
        ) as bar:
            yield lambda amount, /: (bar.update(amount), None)[1]
    else:
        lines = _Lines(total, what, unit, done)
        yield lines.advance
        lines.write()


class _Lines:
    def __init__(self, total: int, what: str, unit: str, done: int) -> None:
        self.total, self.what, self.unit = total, what, unit
        self.done = self.began_with = done
        self.start = self.last = monotonic()

    def advance(self, amount: int, /) -> None:
        self.done += amount
        if monotonic() - self.last > _LINE_EVERY:
            self.write()

    def write(self) -> None:
        self.last = monotonic()
        rate = (self.done - self.began_with) / max(self.last - self.start, 1e-9)
        share = self.done / max(self.total, 1)
        done = f"{self.done:,} of {self.total:,} {self.unit} ({share:.0%})"
        speed = f"{rate:,.0f}" if rate >= 10 else f"{rate:.2g}"
        print(f"{self.what}: {done}, {speed}/s", file=sys.stderr, flush=True)
