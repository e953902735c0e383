"""How commands with language models begin."""

from __future__ import annotations

import argparse
import sys

from flowdata.text.models import check_model, hide_progress, load_transformers


def begin(options: argparse.Namespace, *models: str) -> None:
    """Load transformers, and let other libraries show bars of progress on a terminal alone.

    What is missing is told before data is read or fetched.

    Args:
        options: a command's.
        models: hub ids or paths of the models that it loads.

    Raises:
        FileNotFoundError: a model's name is of something on this machine that is not there.
        ImportError: transformers is not installed.
    """
    load_transformers()
    for model in models:
        check_model(model)
    if options.quiet or not sys.stderr.isatty():
        hide_progress()
