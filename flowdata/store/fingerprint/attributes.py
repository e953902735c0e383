"""The attributes of objects and classes: which they have, and what they are."""

from __future__ import annotations

import random
import sys
import types
import weakref
from collections.abc import Iterator, Set
from typing import Any

import numpy as np
import torch

from flowdata.store.fingerprint.code import home_of, is_of_library

# Special methods that make objects, show them or pack them, and so change no result.
_BESIDE_CALLS = {
    *("__init__", "__new__", "__post_init__", "__repr__", "__str__", "__init_subclass__"),
    *("__getstate__", "__setstate__", "__reduce__", "__reduce_ex__", "__del__", "__annotate__"),
    *("__annotate_func__", "__dir__", "__sizeof__"),
}
_GENERATORS = (torch.Generator, np.random.Generator, np.random.RandomState, random.Random)
_BESIDE_RESULTS = (
    *("logging", "torch.utils.tensorboard", "torch.optim", "torch.profiler", "wandb", "tqdm"),
    *("lightning", "pytorch_lightning", "transformers.trainer", "tensorboard", "threading"),
)


def state_of(value: Any) -> dict[str, Any] | list[Any] | None:
    """Return what an object holds: its attributes by name, those in slots too.

    Of an object of Python's own library it is a list, as pickle takes it. None where it can't be
    read.
    """
    kind = type(value)
    root = kind.__module__.partition(".")[0]
    if root in ("datasets", "pyarrow", "pandas") or isinstance(value, weakref.ref):
        return None
    if root in sys.stdlib_module_names and root != "__main__":
        try:
            return list(value.__reduce_ex__(2)[1:3])
        except Exception:  # a lock, a file, a generator: nothing that lasts
            return None
    slots = [name for base in kind.__mro__ for name in _slots(base) if hasattr(value, name)]
    attributes = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    can_be_read = attributes or hasattr(value, "__dict__") or not is_of_library(kind.__module__)
    return attributes if can_be_read else None


def is_builtin_name(value: Any) -> bool:
    """Return whether a value is a function or class of Python itself, which its name tells."""
    return getattr(value, "__module__", None) == "builtins" and isinstance(
        value, type | types.BuiltinFunctionType
    )


def is_beside_results(value: Any) -> bool:
    """Return whether a value changes no result: a logger, say.

    Nor do the states of generators, which are what calls leave behind.
    """
    return isinstance(value, _GENERATORS) or type(value).__module__.startswith(_BESIDE_RESULTS)


def members_of(kind: type, beside: Set[str]) -> dict[str, Any]:
    """Return the attributes of a class that decide on what its methods return, by name.

    Args:
        kind: the class.
        beside: names of methods that change no result.
    """
    left_out = _BESIDE_CALLS | beside
    members = sorted(vars(kind).items())
    return {k: v for k, v in members if k not in left_out and _is_member(k, v)}


def patches_of(kind: type, beside: Set[str]) -> Iterator[tuple[str, types.FunctionType]]:
    """Yield the methods of a known package's class that somebody else has put in their places.

    Args:
        kind: the class.
        beside: names of methods that change no result.
    """
    left_out = _BESIDE_CALLS | beside
    for base in filter(lambda base: is_of_library(base.__module__), kind.__mro__):
        for name, value in sorted(vars(base).items()):
            is_method = isinstance(value, types.FunctionType) and name not in left_out
            if is_method and not is_of_library(home_of(value)):
                yield name, value


def _is_member(name: str, value: Any) -> bool:
    """Whether a class's attribute decides on what its methods return."""
    if name.startswith("__") and name.endswith("__"):
        return isinstance(value, types.FunctionType)
    return not name.startswith("_abc_") and not isinstance(value, types.MemberDescriptorType)


def is_code(value: Any) -> bool:
    """Return whether a value is a class, or a module of the user's: they hold code and more."""
    if isinstance(value, types.ModuleType):
        return not is_of_library(value.__name__)
    return isinstance(value, type)


def function_inside(value: Any) -> Any:
    """Return the function that a callable wraps, None where it wraps none."""
    inner = getattr(value, "__wrapped__", None)
    return inner if isinstance(inner, types.FunctionType) else None


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else list(slots)
