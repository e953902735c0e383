"""The parser of the command line, made from the commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence

from flowdata._version import __version__
from flowdata.cli.commands import COMMANDS
from flowdata.cli.shell.completion import SHELLS, PrintCompletion
from flowdata.cli.shell.config import config_file, use_config
from flowdata.cli.shell.wording import actions_of, flags_of


def parse_options(
    arguments: Sequence[str],
) -> tuple[argparse.Namespace, Mapping[str, argparse.Action]]:
    """Return a command's options, from its arguments and its `--config` file.

    Args:
        arguments: the command's name and what follows it.

    Returns:
        The options; `run` among them is the command's function. And the flags that set them, by
        the names that messages of the library have for them (`flags_of`).
    """
    parser = make_parser()
    file = config_file(arguments)
    command = next((word for word in arguments if word in COMMANDS), None)
    if file is not None and command is not None:
        try:
            use_config(file, actions_of(parser, command))
        except (OSError, ValueError) as error:
            parser.exit(2, f"flowdata {command}: {error}\n")
    options = parser.parse_args(arguments)
    return options, flags_of(parser, options.command)


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `options.run` of what it parses is the command's function."""
    parser = argparse.ArgumentParser(
        prog="flowdata", description="Fine-tuning without forgetting, in the data layer."
    )
    parser.add_argument("--version", action="version", version=__version__)
    parser.add_argument(
        "--print-completion",
        action=PrintCompletion,
        choices=SHELLS,
        help="print what makes the shell complete flowdata's commands, and stop",
    )
    subparsers = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        first_line = (command.run.__doc__ or "").splitlines()[0]
        subparser = subparsers.add_parser(name, help=first_line, description=first_line)
        subparser.set_defaults(run=command.run)
        subparser.add_argument("--json", action="store_true", help="print one JSON object")
        subparser.add_argument(
            "--quiet", action="store_true", help="print no more than the result, and warnings"
        )
        subparser.add_argument(
            "--config", metavar="FILE", help="TOML or YAML of these options; flags win over it"
        )
        command.add_options(subparser)
    return parser
