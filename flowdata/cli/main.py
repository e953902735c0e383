"""The `flowdata` command: parses, runs one command, and turns errors into exit codes."""

from __future__ import annotations

import argparse
import logging
import signal
import sys
import threading
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager

from flowdata._common.notices import logger
from flowdata.cli.exit_codes import BAD_INPUT, INTERRUPTED, USER_ERRORS
from flowdata.cli.parser import parse_options
from flowdata.cli.shell.wording import in_flags


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command and return its exit code; None takes the process's own arguments."""
    options, flags = parse_options(sys.argv[1:] if argv is None else argv)
    try:
        with _logging_to_stderr(flags, quiet=options.quiet), _sigterm_as_exception():
            code: int = options.run(options)
    except USER_ERRORS as error:
        message = in_flags(str(error), flags)
        print(f"flowdata {options.command}: {message}", file=sys.stderr)
        return BAD_INPUT
    except KeyboardInterrupt:
        print(f"flowdata {options.command}: interrupted", file=sys.stderr)
        return INTERRUPTED
    return code


@contextmanager
def _sigterm_as_exception() -> Iterator[None]:
    """Let SIGTERM end the program as an error would, so that what is scored is kept."""

    def stop(number: int, _: object) -> None:
        raise SystemExit(128 + number)

    # Python allows a signal's handler to be set in the main thread alone.
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = signal.signal(signal.SIGTERM, stop)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _logging_to_stderr(flags: Mapping[str, argparse.Action], *, quiet: bool) -> Iterator[None]:
    """Show the library's log while a command runs; a library on its own sets up no logging."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_InFlags(flags))
    level = logger.level
    logger.addHandler(handler)
    logger.setLevel(logging.WARNING if quiet else logging.INFO)
    try:
        yield
    finally:
        logger.removeHandler(handler)
        logger.setLevel(level)


class _InFlags(logging.Formatter):
    """Writes the log's sentences with flags where they name arguments of Python."""

    def __init__(self, flags: Mapping[str, argparse.Action]) -> None:
        super().__init__()
        self._flags = flags

    def format(self, record: logging.LogRecord) -> str:
        """Return a sentence of the log."""
        return in_flags(super().format(record), self._flags)
