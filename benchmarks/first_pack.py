"""The moment of a run's first pack: the library says how it scores just before it."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager


class _Announcement(logging.Handler):
    """Calls a function at the sentence that says how samples are scored."""

    def __init__(self, call: Callable[[], object]) -> None:
        super().__init__()
        self.call = call

    def emit(self, record: logging.LogRecord) -> None:
        if "checked alone" in record.getMessage():
            self.call()


@contextmanager
def at_first_pack(call: Callable[[], object]) -> Iterator[None]:
    """Call a function just before the first pack of each run in a block."""
    logger, listener = logging.getLogger("flowdata"), _Announcement(call)
    level = logger.level
    logger.addHandler(listener)
    logger.setLevel(logging.DEBUG)  # at which a run without progress says it
    try:
        yield
    finally:
        logger.removeHandler(listener)
        logger.setLevel(level)
