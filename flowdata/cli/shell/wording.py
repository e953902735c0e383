"""Messages in the command line's own words.

The library's errors name arguments of Python and extras of its distribution. On the command line
these are flags, and a command that installs what is missing.
"""

from __future__ import annotations

import argparse
import re
import shlex
import sys
from collections.abc import Mapping
from importlib.metadata import PackageNotFoundError, requires
from pathlib import Path

_DISTRIBUTION = "flowdata-torch"
_INSTALL = re.compile(rf'pip install "{_DISTRIBUTION}\[(\w+)\]"')
_REQUIREMENT = re.compile(r"([^;]+?)\s*;.*extra == ['\"](\w+)['\"]")
_OWN_EXTRA = re.compile(rf"{_DISTRIBUTION}\[(\w+)\]")
# What only a program can do, and what stands for it on the command line: as it is written in the
# library, in the flags' own words, and the flag without which they make no sense.
_PHRASES = (
    (
        "weights(missing='zero') gives them weight 0",
        "flowdata weigh gives them null for a weight, and leaves them out with --missing drop",
        None,
    ),
    ("score with LossScorer(..., token_losses=True)", "score with --token-losses", None),
    ("delete this one if its losses", "pass --overwrite if its losses", "overwrite"),
    (", or a callable losses -> float", "", None),
    (" must be a positive integer or None,", " must be a positive integer,", None),
)
# A value stands behind an equals sign; without one an argument is named where it begins a rule.
_VALUE = r"=(?P<value>'[^']*'|\"[^\"]*\"|[\w./…-]*[\w/…])"
_RULE = r"(?= (?:must|goes with|has no effect)\b)"


def in_flags(message: str, flags: Mapping[str, argparse.Action]) -> str:
    """Return a message with flags for arguments of Python, and a command for what is missing.

    Args:
        message: an error's or the log's.
        flags: the options of the command that runs, by the name of their argument.

    Example:
        >>> parser = argparse.ArgumentParser()
        >>> action = parser.add_argument("--on-error")
        >>> in_flags("pass on_error='skip' to leave it out", {"on_error": action})
        'pass --on-error skip to leave it out'
    """
    message = _INSTALL.sub(lambda match: _command_to_install(match[1]), message)
    for words, in_own_words, flag in _PHRASES:
        if flag is None or flag in flags:
            message = message.replace(words, in_own_words)
    if not flags:
        return message
    names = "|".join(map(re.escape, sorted(flags, key=len, reverse=True)))
    pattern = re.compile(rf"(?<![\w.'\"=/-])(?P<name>{names})(?:{_VALUE}|{_RULE})")
    return pattern.sub(lambda match: _flag(flags[match["name"]], match["value"]), message)


def flags_of(parser: argparse.ArgumentParser, command: str) -> dict[str, argparse.Action]:
    """Return the options of a command by the names that the library has for their arguments."""
    flags = {}
    for action in actions_of(parser, command):
        if action.option_strings:
            flags[action.dest] = action
            flags[action.dest.removesuffix("_column")] = action  # of Fields
    return flags | ({"template_options": flags["template_option"]} if "template" in flags else {})


def actions_of(parser: argparse.ArgumentParser, command: str) -> list[argparse.Action]:
    """Return the arguments of a command, `--help` left out."""
    return [
        action
        for action in parser_of(parser, command)._actions
        if not isinstance(action, argparse._HelpAction)
    ]


def parser_of(parser: argparse.ArgumentParser, command: str) -> argparse.ArgumentParser:
    """Return the parser of a command, of those that `parser` chooses from."""
    commands: argparse._SubParsersAction[argparse.ArgumentParser] = next(
        action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
    )
    return commands.choices[command]


def _flag(action: argparse.Action, value: str | None) -> str:
    """An option as it is written on the command line."""
    if action.nargs == 0:  # a switch
        return action.option_strings[-1 if value == "False" else 0]
    flag = action.option_strings[0]
    return flag if value is None else f"{flag} {shlex.quote(value.strip(chr(39) + chr(34)))}"


def _command_to_install(extra: str) -> str:
    """The command that installs what an extra needs; flowdata itself is there already."""
    packages = " ".join(map(shlex.quote, _packages_of(extra)))
    return f"{shlex.quote(sys.executable)} -m pip install {packages}"


def _packages_of(extra: str) -> list[str]:
    try:
        lines = requires(_DISTRIBUTION) or []
    except PackageNotFoundError:  # the source is run where it lies, in a folder that pip installs
        return [f"{Path(__file__).parents[3]}[{extra}]"]
    packages: list[str] = []
    for line in lines:
        match = _REQUIREMENT.match(line)
        if match is None or match[2] != extra:
            continue
        own = _OWN_EXTRA.match(match[1])
        packages += _packages_of(own[1]) if own else [match[1]]
    return list(dict.fromkeys(packages))
