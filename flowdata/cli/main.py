"""The `flowdata` command: parses, runs one command, and turns errors into exit codes."""

from __future__ import annotations

import logging
import signal
import sys
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from flowdata._common.notices import logger
from flowdata.cli.commands import MISTAKES
from flowdata.cli.options import parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code."""
    options = parser().parse_args(argv)
    try:
        with _logging_to_stderr(), _terminable():
            code: int = options.run(options)
    except MISTAKES as error:
        print(f"flowdata {options.command}: {error}", file=sys.stderr)
        return 2
    except KeyboardInterrupt:
        print(f"flowdata {options.command}: interrupted", file=sys.stderr)
        return 130
    return code


@contextmanager
def _terminable() -> Iterator[None]:
    """Let SIGTERM end the program as an error would, so that what is done is kept."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging_to_stderr() -> Iterator[None]:
    handler = logging.StreamHandler(sys.stderr)
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)
