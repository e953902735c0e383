"""What commands print: text to read, or one JSON object."""

from __future__ import annotations

import argparse
import json
import math
from collections.abc import Mapping
from typing import Any


def print_result(options: argparse.Namespace, facts: Mapping[str, Any], text: str) -> None:
    """Print a command's result: as JSON where `--json` asks for it, else text, unless `--quiet`.

    JSON has no NaN and no infinity: there they are null.
    """
    if options.json:
        print(json.dumps(_finite(facts), allow_nan=False))
    elif not options.quiet:
        print(text)


def _finite(value: Any) -> Any:
    """The value with None for all of its numbers that are not finite."""
    if isinstance(value, Mapping):
        return {name: _finite(part) for name, part in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(part) for part in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def list_figures(summary: Mapping[str, Any]) -> str:
    """Return the figures of a summary, one a line, those of one thing together; no lists.

    Example:
        >>> summary = {"samples": 3, "loss": {"mean": 1.0, "max": 2.5}, "temperature": 0.51234}
        >>> print(list_figures(summary))
          samples: 3
          loss: mean 1, max 2.5
          temperature: 0.5123
    """
    return "\n".join(
        f"  {name.replace('_', ' ')}: {_figure(value)}"
        for name, value in summary.items()
        if not isinstance(value, list)
    )


def _figure(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{name} {_figure(part)}" for name, part in value.items())
    if isinstance(value, int | float):
        return f"{value:,.4g}" if isinstance(value, float) else f"{value:,}"
    return str(value)
