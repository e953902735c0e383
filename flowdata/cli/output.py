"""What commands print: text to read, or one JSON object."""

from __future__ import annotations

import argparse
import json
from collections.abc import Mapping
from typing import Any


def print_result(options: argparse.Namespace, facts: Mapping[str, Any], text: str) -> None:
    """Print a command's result: as JSON where `--json` asks for it, else text, unless `--quiet`."""
    if options.json:
        print(json.dumps(facts))
    elif not options.quiet:
        print(text)


def list_figures(summary: Mapping[str, Any]) -> str:
    """Return the single figures of a summary, one a line; nested ones are left out.

    Example:
        >>> print(list_figures({"samples": 3, "temperature": 0.51234, "loss": {"mean": 1.0}}))
          samples: 3
          temperature: 0.5123
    """
    figures = {name: value for name, value in summary.items() if not isinstance(value, dict | list)}
    return "\n".join(
        f"  {name.replace('_', ' ')}: {f'{value:,.4g}' if isinstance(value, float) else value}"
        for name, value in figures.items()
    )
