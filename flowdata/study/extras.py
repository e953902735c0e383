"""Packages that only a study needs, imported when they are used."""

from __future__ import annotations

import importlib
from typing import Any


def load_extra(module: str, purpose: str) -> Any:
    """Return a module of the extra `study`.

    Args:
        module: the module's full name.
        purpose: the things that need it, in the plural, for the message.

    Raises:
        ImportError: the module's package is not installed; the message names the extra.
    """
    try:
        return importlib.import_module(module)
    except ImportError:
        package = module.partition(".")[0]
        raise ImportError(
            f'{purpose} need {package}: pip install "flowdata-torch[study]"'
        ) from None
