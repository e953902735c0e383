"""The values that a function's code finds by name: globals, captured ones, imports, its own."""

from __future__ import annotations

import dis
import importlib
import sys
import types
from collections.abc import Iterator
from typing import Any

from flowdata.store.fingerprint.code import is_of_library
from flowdata.store.fingerprint.instructions import code_within, contents_of, globals_read


def values_named(function: types.FunctionType) -> dict[str, Any]:
    """Return the values that a function uses beside its arguments, by the names it has for them.

    The attributes that it was given stand under ``<its name>.<theirs>``, and the modules that it
    imports while it runs under ``import <name>``, None for one that can't be imported. Modules of
    known packages are left out of the latter.
    """
    named = {name: function.__globals__.get(name) for name in globals_read(function)}
    named |= contents_of(function)
    own = {name: value for name, value in vars(function).items() if not name.startswith("_")}
    named |= {f"{function.__name__}.{name}": value for name, value in own.items()}
    values = {name: value for name, value in named.items() if value is not None}
    package = function.__globals__.get("__package__")
    return values | {
        f"import {name}": _imported(name, parts, package) for name, parts in _imports(function)
    }


def _imports(function: types.FunctionType) -> Iterator[tuple[str, tuple[str, ...]]]:
    """Yield the modules that a function's code imports: each one's name, and what is taken of it.

    Those of known packages are left out.
    """
    for code in code_within(function.__code__):
        steps = [step for step in dis.get_instructions(code) if step.opname != "EXTENDED_ARG"]
        for index, step in enumerate(steps):
            if step.opname != "IMPORT_NAME":
                continue
            level, parts = (before.argval for before in steps[index - 2 : index])
            name = "." * level + step.argval
            if not is_of_library(name):
                yield name, tuple(parts or ())


def _imported(name: str, parts: tuple[str, ...], package: str | None) -> types.ModuleType | None:
    """The module that code gets by `import name` or `from name import parts`.

    It is imported, as the function's first call would: else a fingerprint before that call were
    another than one after it.
    """
    try:
        module = importlib.import_module(name, package)
        for part in parts:
            if not hasattr(module, part):
                importlib.import_module(f"{module.__name__}.{part}")
    except (Exception, SystemExit):  # a package that is not there, or a script
        return None
    return module if parts else sys.modules[name.partition(".")[0]]
