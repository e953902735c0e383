"""How commands with language models begin."""

from __future__ import annotations

import argparse
import sys

from flowdata.models.placement import usable_device
from flowdata.text.models import check_model, hide_progress, load_transformers


def begin(options: argparse.Namespace, *models: str) -> None:
    """Load transformers, and let other libraries show bars of progress on a terminal alone.

    What is missing is told before data is read or fetched.

    Args:
        options: a command's, `device` among them.
        models: hub ids or paths of the models that it loads.

    Raises:
        ValueError: the device that the options name can't be used here.
        FileNotFoundError: a model's name is of something on this machine that is not there.
        ImportError: transformers is not installed.
    """
    if options.device is not None:
        usable_device(options.device)
    load_transformers()
    for model in models:
        check_model(model)
    if options.quiet or not sys.stderr.isatty():
        hide_progress()
