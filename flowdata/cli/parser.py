"""The parser of the command line, made from the commands and their options."""

from __future__ import annotations

import argparse

from flowdata._version import __version__
from flowdata.cli.commands import COMMANDS


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `options.run` of what it parses is the command's function."""
    parser = argparse.ArgumentParser(
        prog="flowdata", description="Fine-tuning without forgetting, in the data layer."
    )
    parser.add_argument("--version", action="version", version=__version__)
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        first_line = (command.run.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=first_line, description=first_line)
        subparser.set_defaults(run=command.run)
        subparser.add_argument("--json", action="store_true", help="print one JSON object")
        subparser.add_argument("--quiet", action="store_true", help="no progress display")
        command.add_options(subparser)
    return parser
