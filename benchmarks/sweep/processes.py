"""A process of its own for every architecture, so that a crash or a hang ends one row only."""

from __future__ import annotations

import multiprocessing
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from multiprocessing.connection import Connection
from time import monotonic
from typing import Any

import torch

from benchmarks.sweep.building import first_line

Row = dict[str, Any]
MakeRow = Callable[[str, str], Row]


def rows_of(
    tasks: Iterable[tuple[str, str]], make_row: MakeRow, *, limit: float, jobs: int = 1
) -> Iterator[Row]:
    """Yield a row for each (kind, name), as they come, `jobs` at a time.

    A row whose process takes more than `limit` seconds says that it is too slow; one whose
    process dies says by what. The processes are forked: transformers is imported once.
    """
    waiting = iter(tasks)
    running: list[_Process] = []
    while True:
        while len(running) < jobs and (task := next(waiting, None)) is not None:
            running.append(_Process(*task, make_row, limit))
        if not running:
            return
        process = running.pop(0)
        yield process.row()


class _Process:
    """One architecture's, from its fork to its row."""

    def __init__(self, kind: str, name: str, make_row: MakeRow, limit: float) -> None:
        self.start, self.limit = monotonic(), limit
        self.task = {"kind": kind, "name": name}
        context = multiprocessing.get_context("fork")
        self.answers, answer = context.Pipe(duplex=False)
        self.process = context.Process(target=_run, args=(kind, name, make_row, answer))
        self.process.start()
        answer.close()

    def row(self) -> Row:
        """Wait for the row, or for the limit, after which the process is killed."""
        row: Row = {"built": False, "why": ""}
        if self.answers.poll(max(0.0, self.start + self.limit - monotonic())):
            try:
                row = self.answers.recv()
            except EOFError:  # the process died before it had a row
                self.process.join()
                row["why"] = f"crash: {_reason(self.process.exitcode)}"
        else:
            row |= {"too_slow": True, "why": f"more than {self.limit:g} s"}
        self.process.kill()
        self.process.join()
        return self.task | row | {"seconds": round(monotonic() - self.start, 1)}


def _run(kind: str, name: str, make_row: MakeRow, answer: Connection) -> None:
    torch.set_num_threads(1)
    sys.stdout = sys.stderr = open(os.devnull, "w")  # noqa: PTH123, SIM115
    try:
        row = make_row(kind, name)
    except Exception as error:  # the sweep's own fault, kept as such
        row = {"built": False, "why": f"the sweep: {first_line(error)}"}
    answer.send(row)


def _reason(code: int | None) -> str:
    if code is not None and code < 0:
        return signal.Signals(-code).name
    return f"exit code {code}"
