"""Telling the user a sentence: all of it goes through the logger `flowdata`."""

from __future__ import annotations

import logging
import sys

logger = logging.getLogger("flowdata")


def say(message: str, *, shown: bool = True) -> None:
    """Log a sentence, and print it where the program has set up no logging."""
    logger.log(logging.INFO if shown else logging.DEBUG, message)
    if shown and not logger.hasHandlers():
        print(f"flowdata: {message}", file=sys.stderr)
