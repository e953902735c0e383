"""Notices: every sentence to the user goes through the logger `flowdata`."""

from __future__ import annotations

import logging
import sys

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
