"""A hook of MkDocs: the reference of the command line, from the parser that runs it."""

from __future__ import annotations

import argparse
import html
from collections.abc import Iterable
from typing import Any

from flowdata.cli.commands import COMMANDS
from flowdata.cli.parser import make_parser
from flowdata.cli.shell.wording import actions_of

MARK = "<!-- the commands -->"  # stands in reference/command_line.md where they are to be


def on_page_markdown(markdown: str, **_: Any) -> str:
    """Put the commands where a page has their mark."""
    return markdown.replace(MARK, commands()) if MARK in markdown else markdown


def commands() -> str:
    """Return every command with its arguments and options, as Markdown."""
    parser = make_parser()
    actions = {name: actions_of(parser, name) for name in COMMANDS}
    sets = [{line_of(action) for action in each} for each in actions.values()]
    common = set.intersection(*sets)  # said once
    parts = []
    for name, command in COMMANDS.items():
        title = (command.run.__doc__ or "").splitlines()[0]
        lines = [line for action in actions[name] if (line := line_of(action)) not in common]
        parts.append("\n".join([f"## flowdata {name}", "", title, "", *lines]))
    shared = [line for action in actions["score"] if (line := line_of(action)) in common]
    of_flowdata = [line_of(action) for action in parser._actions if action.option_strings]
    parts.append("\n".join(["## Every command", "", *shared]))
    parts.append("\n".join(["## flowdata itself", "", *of_flowdata]))
    return "\n\n".join(parts)


def line_of(action: argparse.Action) -> str:
    """Return an argument or option as an item of a list: how it is written, and its help."""
    names = ", ".join(f"`{form}`" for form in forms_of(action))
    required = " (required)" if action.required and action.option_strings else ""
    return f"- {names}{required}  \n  {help_of(action)}"


def forms_of(action: argparse.Action) -> Iterable[str]:
    """Return the ways to write an argument, each with a name for its value."""
    if action.choices is not None:
        value = "{" + ",".join(map(str, action.choices)) + "}"
    else:
        value = str(action.metavar or action.dest.upper())
    if not action.option_strings:
        return [f"{action.dest.upper()} …" if action.nargs == "+" else action.dest.upper()]
    if action.nargs == 0:
        return action.option_strings
    return [
        f"{flag} {value}{' …' if action.nargs == '+' else ''}" for flag in action.option_strings
    ]


def help_of(action: argparse.Action) -> str:
    """Return an option's help with its default, safe in Markdown."""
    text = (action.help or "") % {**vars(action), "prog": "flowdata"}
    is_set = action.default not in (None, (), [], argparse.SUPPRESS) and action.nargs != 0
    if is_set and "default" not in text:
        text += f" (default: {action.default})"
    return html.escape(text, quote=False).replace("*", r"\*").replace("_", r"\_")
