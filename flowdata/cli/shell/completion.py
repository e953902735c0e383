"""Shell completion: a script of bash or zsh, made from the parser."""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Mapping
from typing import Any

SHELLS = ("bash", "zsh")
_ZSH = "autoload -Uz compinit bashcompinit && compinit && bashcompinit\n"
_SCRIPT = """\
_flowdata() {{
  local current="${{COMP_WORDS[COMP_CWORD]}}" previous="${{COMP_WORDS[COMP_CWORD-1]}}"
  COMPREPLY=()
  if [ "$COMP_CWORD" -eq 1 ]; then
    COMPREPLY=($(compgen -W {commands} -- "$current"))
    return
  fi
  case "${{COMP_WORDS[1]}} $previous" in
{choices}
  esac
  case "$current" in
    -*) case "${{COMP_WORDS[1]}}" in
{flags}
    esac ;;
  esac
}}
complete -o default -F _flowdata flowdata
"""


class PrintCompletion(argparse.Action):
    """`--print-completion SHELL`: print the script of a shell, and stop.

    Words that are no flags and no choices are completed as the shell completes names of files.
    """

    def __call__(
        self,
        parser: argparse.ArgumentParser,
        namespace: argparse.Namespace,
        values: Any,
        option_string: str | None = None,
    ) -> None:
        """Print the script of the shell that was named."""
        commands = next(
            action for action in parser._actions if isinstance(action, argparse._SubParsersAction)
        )
        print((_ZSH if values == "zsh" else "") + completion_script(commands.choices), end="")
        parser.exit()


def completion_script(parsers: Mapping[str, argparse.ArgumentParser]) -> str:
    """Return the script of bash that completes commands, their flags, and the flags' choices.

    Args:
        parsers: of the commands, by their names.
    """
    choices, flags = [], []
    for command, parser in parsers.items():
        names = [name for action in parser._actions for name in action.option_strings]
        flags.append(f'      {command}) COMPREPLY=($(compgen -W {_words(names)} -- "$current")) ;;')
        for action in parser._actions:
            if action.choices is None:
                continue
            patterns = "|".join(shlex.quote(f"{command} {name}") for name in action.option_strings)
            words = _words(map(str, action.choices))
            choices.append(
                f'    {patterns}) COMPREPLY=($(compgen -W {words} -- "$current")); return ;;'
            )
    return _SCRIPT.format(
        commands=_words(parsers), choices="\n".join(choices), flags="\n".join(flags)
    )


def _words(names: Any) -> str:
    return shlex.quote(" ".join(names))
