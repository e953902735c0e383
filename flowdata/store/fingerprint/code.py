"""What compiled code says, and whose it is.

A file and its line numbers stay out of it, and so does a docstring, so that code may be moved and
laid out anew. The bytecode depends on the version of Python.
"""

from __future__ import annotations

import functools
import inspect
import sys
import types
from collections.abc import Iterator, Set
from typing import Any

from flowdata.store.fingerprint.instructions import (
    attributes_read,
    contents_of,
    globals_read,
    names_filled,
    names_read,
)

# Packages that are known by their names alone, as Python's own are: a release of theirs, which
# changes code everywhere, is no reason to throw losses away.
_PACKAGES = (
    *(
        "flowdata",
        "torch",
        "transformers",
        "peft",
        "accelerate",
        "numpy",
        "datasets",
        "safetensors",
    ),
    *("tokenizers", "torchvision", "torchaudio", "torchao", "bitsandbytes", "timm", "open_clip"),
    *("sentence_transformers", "diffusers", "lightning", "lightning_fabric", "pytorch_lightning"),
    *("lightning_utilities", "torchmetrics", "trl", "scipy", "sklearn", "pandas", "pyarrow", "PIL"),
    *("einops", "triton", "wandb", "tqdm", "pytest", "_pytest", "huggingface_hub", "jinja2"),
)
_LIBRARIES = (set(_PACKAGES) | sys.stdlib_module_names) - {"__main__"}
_HAS_DOCSTRING = 0x4000000  # the flag of code objects since Python 3.13
# Of the other flags some tell where code stands, and of `from __future__` in its file.
_FLAGS = inspect.CO_VARARGS | inspect.CO_VARKEYWORDS | inspect.CO_GENERATOR
_FLAGS |= inspect.CO_COROUTINE | inspect.CO_ASYNC_GENERATOR
_ENTRIES = ("forward", "__call__", "__getitem__")  # the methods by which an object is called


def is_of_library(module_name: str | None) -> bool:
    """Return whether a module of this name belongs to Python or to a package known by name."""
    return module_name is not None and module_name.partition(".")[0] in _LIBRARIES


def home_of(function: types.FunctionType) -> str:
    """Return the name of the module in which a function's code was written.

    `functools.wraps` gives a wrapper the `__module__` of what it wraps; its globals stay its own.
    """
    while isinstance(function, functools.partial):
        function = function.func
    names = getattr(function, "__globals__", None)  # a callable object has none
    home = getattr(function, "__module__", None) if names is None else names.get("__name__")
    return str(home or "__main__")


def describe_code(code: types.CodeType) -> list[Any]:
    """Return the content of a code object as JSON-like values, the same in every process."""
    constants = list(code.co_consts)
    if constants and _has_docstring(code):
        constants[0] = None
    return [
        code.co_code.hex(),
        getattr(code, "co_exceptiontable", b"").hex(),
        [code.co_argcount, code.co_posonlyargcount, code.co_kwonlyargcount],
        code.co_flags & _FLAGS,
        [list(code.co_names), list(code.co_varnames), list(code.co_freevars)],
        [_describe_constant(constant) for constant in constants],
    ]


def _has_docstring(code: types.CodeType) -> bool:
    """Whether the first constant is a docstring, which no instruction reads."""
    if sys.version_info >= (3, 13):
        return bool(code.co_flags & _HAS_DOCSTRING)
    is_function = not code.co_name.startswith("<") and bool(code.co_flags & inspect.CO_NEWLOCALS)
    return is_function and isinstance(code.co_consts[0], str)


def _describe_constant(constant: Any) -> Any:
    if isinstance(constant, types.CodeType):  # of a function defined inside this one
        return describe_code(constant)
    if isinstance(constant, tuple):
        return [_describe_constant(part) for part in constant]
    # The order of a frozenset changes from process to process.
    return sorted(map(repr, constant)) if isinstance(constant, Set) else repr(constant)


def functions_in(value: Any) -> Iterator[types.FunctionType]:
    """Yield the functions that a class's attribute runs: its own and those it wraps or captures."""
    queue, known = [value], set()
    while queue:
        part = queue.pop()
        if id(part) in known:
            continue
        known.add(id(part))
        if isinstance(part, property):
            queue += [part.fget, part.fset]
        elif isinstance(part, staticmethod | classmethod | types.MethodType):
            queue.append(part.__func__)
        elif isinstance(part, functools.partial | functools.cached_property):
            queue.append(part.func)
        elif isinstance(part, types.FunctionType):
            yield part
            queue += contents_of(part).values()
        elif hasattr(part, "__wrapped__"):
            queue.append(part.__wrapped__)


def cached_properties(kind: type) -> set[str]:
    """Return the names under which objects of a class hold what its code has computed once."""
    attributes: dict[str, Any] = {}
    for base in reversed(kind.__mro__):
        attributes |= vars(base)
    return {
        name
        for name, attribute in attributes.items()
        if isinstance(attribute, functools.cached_property)
    }


def filled_by_calls(kind: type, entry: str | None = None) -> set[str]:
    """Return what a class's `forward`, `__call__` or `__getitem__` fills (`names_filled`).

    The methods that these name, and those that these name in turn, belong to them.

    Args:
        kind: the class.
        entry: the name of another method by which its objects are called.
    """
    names: set[str] = set()
    owners = {base.__name__ for base in kind.__mro__}
    queue = list(filter(None, (*_ENTRIES, entry)))
    known = set(queue)
    while queue:
        name = queue.pop()
        for base in kind.__mro__:
            if base is object or base.__module__ == "torch.nn.modules.module":
                continue
            for function in functions_in(vars(base).get(name)):
                names |= {_of_self(path, owners) for path in names_filled(function)}
                queue += names_read(function) - known
                known |= names_read(function)
    return names


def _of_self(path: str, owners: Set[str]) -> str:
    """A path as it is from an object of a class: what is filled of the class is filled of it."""
    owner, _, rest = path.partition(".")
    return rest if rest and owner in owners else path


def names_read_by(kind: type, *, libraries: bool = False) -> set[str]:
    """Return the names in a class's methods; those of the user's own methods alone.

    Args:
        kind: the class.
        libraries: take the methods of known packages too, `__init__` included.
    """
    return {
        name
        for base in kind.__mro__
        if libraries or not is_of_library(base.__module__)
        if base is not object and base.__module__ != "torch.nn.modules.module"
        for attribute, value in vars(base).items()
        if libraries or attribute != "__init__"
        for own in functions_in(value)
        for function in ([own] if libraries else with_helpers(own))
        for name in names_read(function)
    }


def attributes_read_by(function: types.FunctionType) -> set[str]:
    """Return the names of attributes in a function and in what it calls by name.

    Options that it hands on to functions and classes of the user's own are read by these.
    """
    names: set[str] = set()
    for part in with_helpers(function):
        named = (part.__globals__.get(name) for name in globals_read(part))
        kinds = [each for each in named if isinstance(each, type)]
        methods = (
            own
            for kind in kinds
            if not is_of_library(kind.__module__)
            for value in vars(kind).values()
            for own in functions_in(value)
        )
        names = names.union(*map(attributes_read, (part, *methods)))
    return names


def with_helpers(function: types.FunctionType) -> Iterator[types.FunctionType]:
    """Yield a function and the user's own functions that it calls by their names in a file."""
    queue, known = [function], set()
    while queue:
        part = queue.pop()
        if id(part) in known:
            continue
        known.add(id(part))
        yield part
        named = (part.__globals__.get(name) for name in globals_read(part))
        queue += [
            value
            for value in named
            if isinstance(value, types.FunctionType) and not is_of_library(home_of(value))
        ]
