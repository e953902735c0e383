"""A part: measurements in a process of their own, which a crash or a limit ends alone."""

from __future__ import annotations

import faulthandler
import multiprocessing
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from time import monotonic
from typing import Any

from benchmarks import rows

_LEEWAY = 20.0  # seconds beyond its limit that a part has to end by itself
Row = dict[str, Any]


@dataclass(frozen=True)
class Setting:
    """What every part is told.

    Attributes:
        device: ``"cuda"`` or ``"cpu"``.
        is_tiny: sizes are small, and figures mean nothing.
        output: the folder for whatever is not a row.
        assets: the folder that may hold gsm8k_train.jsonl.
        deadline: the moment, by `time.monotonic`, at which nothing new is begun.
        rows: those of the parts before.
    """

    device: str
    is_tiny: bool
    output: Path
    assets: Path
    deadline: float
    rows: tuple[Row, ...] = ()

    def seconds_left(self) -> float:
        """Return the time to the deadline."""
        return self.deadline - monotonic()


Measure = Callable[[Setting], Iterator[Row]]


def run_part(measure: Measure, setting: Setting) -> Iterator[Row]:
    """Yield a part's rows as it makes them, the first being its machine's.

    An error becomes a row, and so does being stopped.
    """
    # A forked process has the modules loaded already; CUDA is first used in it.
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_run, args=(measure, setting, sender))
    process.start()
    sender.close()
    try:
        while receiver.poll(max(0.0, setting.seconds_left() + _LEEWAY)):
            yield receiver.recv()
        yield {"what": "the rest of this part", "error": "stopped at its limit"}
        process.kill()
    except EOFError:
        process.join()
        if process.exitcode:
            yield {"what": "the rest of this part", "error": f"exit code {process.exitcode}"}


def _run(measure: Measure, setting: Setting, sender: Connection) -> None:
    # A part that is stopped shows where it was.
    faulthandler.dump_traceback_later(max(1.0, setting.seconds_left() + _LEEWAY - 2))
    try:
        sender.send({"machine": rows.machine()})
        for row in measure(setting):
            sender.send(row)
    except (Exception, SystemExit) as error:
        traceback.print_exc()
        reason = f"{type(error).__name__}: {error}"
        sender.send({"what": "the rest of this part", "error": reason[:2000]})
    sender.close()
