"""`flowdata verify`: what in a store is whole and what is not."""

from __future__ import annotations

import argparse

from flowdata.cli.exit_codes import DAMAGED, DONE
from flowdata.cli.output import print_result
from flowdata.store.places import place_of
from flowdata.store.verify import verify_store


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    parser.add_argument("store", help="folder or URL to check")


def run(options: argparse.Namespace) -> int:
    """Check every file of a store."""
    findings = verify_store(place_of(options.store))
    whole = all(state == "whole" for state in findings.values())
    lines = [f"{name}: {state}" for name, state in findings.items()]
    if not whole:
        lines.append("the same flowdata score command scores what is damaged or missing")
    print_result(options, {"whole": whole, "files": findings}, "\n".join(lines))
    return DONE if whole else DAMAGED
