"""Notices: every sentence to the user goes through the logger `flowdata`."""

from __future__ import annotations

import logging
import re
import sys
from types import TracebackType

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
