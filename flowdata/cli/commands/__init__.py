"""The commands: a module each, with its options and the function that runs it."""

from __future__ import annotations

import argparse
from collections.abc import Mapping
from typing import Protocol

from flowdata.cli.commands import bench, demo, drift, front, report, score, verify, weigh


class Command(Protocol):
    """What the module of a command holds."""

    def add_options(self, parser: argparse.ArgumentParser) -> None:
        """Add the command's own options; `--json` and `--quiet` are there already."""

    def run(self, options: argparse.Namespace) -> int:
        """Run the command and return its exit code; the docstring's first line is its help."""


COMMANDS: Mapping[str, Command] = {
    "demo": demo,
    "score": score,
    "weigh": weigh,
    "report": report,
    "verify": verify,
    "drift": drift,
    "front": front,
    "bench": bench,
}
