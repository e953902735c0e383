"""Notices: every sentence to the user goes through the logger `flowdata`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("flowdata")


def say(message: str, *, shown: bool = True) -> None:
    """Log a sentence at level INFO, and print it where the program has set up no logging.

    Without handlers Python drops what is below a warning, but a user in a notebook, who sets up no
    logging, should see what was chosen and what was found.

    Args:
        message: the sentence, without a full stop.
        shown: False logs at level DEBUG and prints nothing.
    """
    logger.log(logging.INFO if shown else logging.DEBUG, message)
    if shown and not logger.hasHandlers():
        print(f"flowdata: {message}", file=sys.stderr)
