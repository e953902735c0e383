"""Notices: every sentence to the user goes through the logger `flowdata`."""

from __future__ import annotations

import logging
import os
import re
import sys
from types import TracebackType

import torch.distributed as dist

logger = logging.getLogger("flowdata")
_PREFIX = "flowdata: "  # of what is printed where the program has set up no logging
_TERMINAL = "flowdata-terminal"


class _Terminal(logging.Handler):
    """Prints warnings where the program has set up no logging, as Python does, but says whose."""

    def emit(self, record: logging.LogRecord) -> None:
        """Print a warning, unless another handler has it."""
        if not _has_logging():
            try:
                print(f"{_PREFIX}{self.format(record)}", file=sys.stderr)
            except Exception:  # as other handlers do: a sentence that fails stops no work
                self.handleError(record)


def _has_logging() -> bool:
    """Whether the program has a handler that gets the library's sentences."""
    place: logging.Logger | None = logger
    while place is not None:
        if any(handler.name != _TERMINAL for handler in place.handlers):
            return True
        place = place.parent if place.propagate else None
    return False


def _add_terminal() -> None:
    """Let warnings be printed, by one handler also where this module is loaded again."""
    for handler in [handler for handler in logger.handlers if handler.name == _TERMINAL]:
        logger.removeHandler(handler)
    terminal = _Terminal(logging.WARNING)
    terminal.name = _TERMINAL
    logger.addHandler(terminal)


_add_terminal()


def say(message: str, *, shown: bool = True) -> None:
    """Log a sentence at level INFO, and print it where the program has set up no logging.

    Without a handler Python drops all messages below a warning. Few people set up logging in a
    notebook, and they should see the library's choices all the same.

    Args:
        message: the sentence, without a full stop.
        shown: False logs at level DEBUG and prints nothing.
    """
    logger.log(logging.INFO if shown else logging.DEBUG, message)
    if shown and not _has_logging():
        print(f"{_PREFIX}{message}", file=sys.stderr)


def warn_once(message: str, *, about: str) -> None:
    """Log a warning, once for each matter and line of the user's program, on the first rank alone.

    A line that is run again, such as one that makes a sampler in every epoch or weighs batch after
    batch, has nothing new to say. Another line has: its reader may look at another part of the log.

    Args:
        message: the sentence, without a full stop.
        about: the matter: what stays the same in the message where figures in it change.
    """
    if _is_new(about):
        logger.warning(message)


def say_once(message: str) -> None:
    """Say a sentence, as often as `warn_once` warns."""
    if _is_new(message):
        say(message)


def is_first_time(matter: str) -> bool:
    """Return whether a matter comes up for the first time in this process, at whatever line.

    It is for what is part of other sentences, and would be repeated with each of them.
    """
    is_first = matter not in _come_up
    _come_up.add(matter)
    return is_first


_come_up: set[str] = set()
_said: set[tuple[str, str, int]] = set()  # matters, with the file and line that they came up at


def _is_new(about: str) -> bool:
    """Whether this process is to tell of a matter, and has not yet for the line it came up at."""
    matter = (about, *_line_of_caller())
    if matter in _said or not is_first_rank():
        return False
    _said.add(matter)
    return True


def is_first_rank() -> bool:
    """Return whether this is rank 0 of a run; torchrun numbers ranks before they are a group."""
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return os.environ.get("RANK", "0") == "0"


def _line_of_caller() -> tuple[str, int]:
    """The line outside this library from which it was called."""
    package = __name__.partition(".")[0]
    frame = sys._getframe(1)
    while frame.f_back and frame.f_globals.get("__name__", "").partition(".")[0] == package:
        frame = frame.f_back
    return frame.f_code.co_filename, frame.f_lineno


class Once(logging.Filter):
    """Lets the logger pass each sentence once, within its ``with`` blocks.

    Work that is done again and again, such as scoring window after window, finds the same things
    each time. Sentences that differ in their numbers alone are the same.
    """

    def __init__(self) -> None:
        super().__init__()
        self._sentences: set[str] = set()

    def filter(self, record: logging.LogRecord) -> bool:
        """Return whether the sentence is new."""
        sentence = re.sub(r"\d+", "0", record.getMessage())
        is_new = sentence not in self._sentences
        self._sentences.add(sentence)
        return is_new

    def __enter__(self) -> None:
        logger.addFilter(self)

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        logger.removeFilter(self)
