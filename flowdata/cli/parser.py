"""The parser of the command line, made from the commands and their options."""

from __future__ import annotations

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path

from flowdata._version import __version__
from flowdata.cli.commands import COMMANDS
from flowdata.cli.shell.completion import SHELLS, PrintCompletion
from flowdata.cli.shell.config import config_file, use_config
from flowdata.cli.shell.wording import actions_of, flags_of, parser_of

# Commands that read a store. What they tell of rows without a loss was noted by `flowdata score`.
_READERS = ("weigh", "report")


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
    command = next(iter(arguments), "")
    file = _use_config_file(parser, arguments) if command in COMMANDS else None
    if file is None:
        options = parser.parse_args(arguments)
    else:
        # Arguments by their place may be left out then, and a plain parse would take all of them
        # for left out that stand behind a flag.
        options = parser_of(parser, command).parse_intermixed_args(arguments[1:])
        options.command = command
    flags = flags_of(parser, options.command)
    if options.command in _READERS:
        flags = flags_of(parser, "score") | flags
    return options, flags


def _use_config_file(parser: argparse.ArgumentParser, arguments: Sequence[str]) -> Path | None:
    """Make the values of the `--config` file, if there is one, the command's defaults."""
    command = arguments[0]
    try:
        file = config_file(arguments)
        if file is not None:
            use_config(file, actions_of(parser, command))
    except (OSError, ValueError) as error:
        parser.exit(2, f"flowdata {command}: {error}\n")
    return file


def make_parser() -> argparse.ArgumentParser:
    """Return the parser; `options.run` of what it parses is the command's function."""
    parser = argparse.ArgumentParser(
        prog="flowdata",
        description="Shows what fine-tuning forgets, without the old data, and weighs samples by "
        "the pre-trained model's loss.",
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
        subparser = subparsers.add_parser(
            name,
            help=first_line,
            description=first_line,
            allow_abbrev=False,  # `config_file` knows `--config` by its whole name
        )
        subparser.set_defaults(run=command.run)
        subparser.add_argument("--json", action="store_true", help="print one JSON object")
        subparser.add_argument(
            "--quiet", action="store_true", help="print nothing but warnings, and JSON if asked for"
        )
        subparser.add_argument(
            "--config", metavar="FILE", help="TOML or YAML of these options; flags win over it"
        )
        command.add_options(subparser)
    return parser
