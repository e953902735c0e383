"""`--config FILE`: the options of a command from a TOML or YAML file.

A file's values take the place of the command's defaults, so that a flag on the command line wins.
"""

from __future__ import annotations

import argparse
import difflib
from collections.abc import Iterable, Mapping
from importlib import import_module
from pathlib import Path
from typing import Any

from flowdata._common.excerpts import one_line

_KINDS = (".toml", ".yaml", ".yml")


def config_file(arguments: Iterable[str]) -> Path | None:
    """Return the file that `--config` names among a command's arguments, if any.

    Raises:
        ValueError: it is named twice.

    Example:
        >>> config_file(["score", "--config=run.toml"]).name, config_file(["score"])
        ('run.toml', None)
    """
    parser = argparse.ArgumentParser(add_help=False, allow_abbrev=False, exit_on_error=False)
    parser.add_argument("--config", action="append", default=[])
    try:
        names = parser.parse_known_args(list(arguments))[0].config
    except argparse.ArgumentError:  # no name follows: the command's own parser will say so
        return None
    if len(names) > 1:
        raise ValueError(f"--config takes one file, got {' and '.join(names)}; join them in one")
    return Path(names[0]) if names else None


def use_config(file: Path, actions: Iterable[argparse.Action]) -> None:
    """Make the values of a file the defaults of a command's arguments.

    Keys are the names of the arguments, `max-length` or `max_length`. A list stands for several
    values, a table for pairs KEY=VALUE, true and false for a switch.

    Args:
        file: TOML or YAML, a table of options.
        actions: the command's arguments.

    Raises:
        FileNotFoundError: there is no such file.
        ValueError: it is of another kind or can't be read, has a key that is no argument of the
            command, or a value that the argument doesn't take.
    """
    by_name = {action.dest: action for action in actions if action.dest != "config"}
    for key, value in _read(file).items():
        action = by_name.get(str(key).replace("-", "_"))
        if action is None:
            raise ValueError(f"{file} has {key!r}, which is no option{_closest(str(key), by_name)}")
        if value is None:
            continue
        try:
            action.default = _converted(action, value)
        except (argparse.ArgumentTypeError, TypeError, ValueError) as error:
            raise ValueError(f"{file}: {key} = {value!r} is not what it takes: {error}") from None
        action.required = False
        if not action.option_strings:  # an argument by its place may be left out then
            action.nargs = "*" if action.nargs == "+" else "?"


def _read(file: Path) -> Mapping[Any, Any]:
    if file.suffix.lower() not in _KINDS:
        raise ValueError(f"--config takes a file that ends in {', '.join(_KINDS)}, got {file}")
    content = file.read_text(encoding="utf-8")
    try:
        table = _parse_toml(content) if file.suffix.lower() == ".toml" else _parse_yaml(content)
    except ImportError:
        raise ValueError("TOML is read with Python 3.11 or newer; write the file as YAML") from None
    except Exception as error:  # each parser has an error of its own
        raise ValueError(f"{file} is no {file.suffix[1:].upper()}: {one_line(error)}") from None
    if not isinstance(table, Mapping):
        raise ValueError(f"{file} should hold options, one a line, it holds {table!r}")
    return table


def _parse_toml(content: str) -> Any:
    return import_module("tomllib").loads(content)  # Python has it from 3.11 on


def _parse_yaml(content: str) -> Any:
    return import_module("yaml").safe_load(content) or {}  # comes with `datasets`


def _converted(action: argparse.Action, value: Any) -> Any:
    """A value of a file as the argument's own conversion makes it of text."""
    if action.nargs == 0:
        if not isinstance(value, bool):
            raise ValueError("it is a switch, true or false")
        return value
    repeated = isinstance(action, argparse._AppendAction)
    if repeated and isinstance(value, Mapping):
        return list(value.items())
    if repeated or action.nargs in ("+", "*"):
        values = value if isinstance(value, list) else [value]
        return [_one(action, item) for item in values]
    return _one(action, value)


def _one(action: argparse.Action, value: Any) -> Any:
    if isinstance(value, bool | list | Mapping):
        raise ValueError(f"one value, not a {type(value).__name__}")
    result = action.type(str(value)) if callable(action.type) else str(value)
    if action.choices is not None and result not in action.choices:
        raise ValueError(f"it is one of {', '.join(map(str, action.choices))}")
    return result


def _closest(key: str, names: Iterable[str]) -> str:
    flags = {name.replace("_", "-"): name for name in names}
    close = difflib.get_close_matches(key.replace("_", "-"), flags, n=1)
    if close:
        return f"; the closest is {close[0]!r}"
    return f"; there are {', '.join(sorted(flags))}"
