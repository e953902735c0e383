"""Notices: every sentence to the user goes through the logger `flowdata`."""

from __future__ import annotations

import functools
import logging
import os
import sys

import torch.distributed as dist

logger = logging.getLogger("flowdata")


def say(message: str, *, shown: bool = True) -> None:
    """Log a sentence at level INFO, and print it where the program has set up no logging.

    Without a handler Python drops all messages below a warning. Few people set up logging in a
    notebook, and they should see the library's choices all the same.

    Args:
        message: the sentence, without a full stop.
        shown: False logs at level DEBUG and prints nothing.
    """
    logger.log(logging.INFO if shown else logging.DEBUG, message)
    if shown and not logger.hasHandlers():
        print(f"flowdata: {message}", file=sys.stderr)


def warn_once(message: str) -> None:
    """Log a warning, once for each message and line of the user's program, on the first rank alone.

    A line that is run again, such as one that makes a sampler in every epoch, has nothing new to
    say. Another line has: its reader may look at another part of the log.
    """
    if _is_first_rank():
        _warn(message, _line_of_caller())


def say_once(message: str) -> None:
    """Say a sentence, as often as `warn_once` warns."""
    if _is_first_rank():
        _say(message, _line_of_caller())


@functools.lru_cache(maxsize=1000)
def _warn(message: str, line: tuple[str, int]) -> None:
    logger.warning(message)


@functools.lru_cache(maxsize=1000)
def _say(message: str, line: tuple[str, int]) -> None:
    say(message)


def _is_first_rank() -> bool:
    """Whether this process is rank 0 of a run; torchrun numbers them before they are a group."""
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
