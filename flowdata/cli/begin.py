"""How commands with language models begin."""

from __future__ import annotations

import argparse
import sys

from flowdata.text.models import hide_progress, load_transformers


def begin(options: argparse.Namespace) -> None:
    """Load transformers, and let other libraries show bars of progress on a terminal alone.

    Args:
        options: a command's.

    Raises:
        ImportError: transformers is not installed; that is told before data is read or fetched.
    """
    load_transformers()
    if options.quiet or not sys.stderr.isatty():
        hide_progress()
