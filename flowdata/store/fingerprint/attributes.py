"""The attributes of objects and classes: which they have, and what they are."""

from __future__ import annotations

import types
from typing import Any


def attributes_of(value: Any) -> dict[str, Any] | None:
    """Return an object's attributes, those in slots too; None where it has no place for any."""
    slots = [name for base in type(value).__mro__ for name in _slots(base) if hasattr(value, name)]
    attributes = {name: getattr(value, name) for name in slots} | getattr(value, "__dict__", {})
    return attributes if attributes or hasattr(value, "__dict__") else None


def is_builtin_name(value: Any) -> bool:
    """Return whether a value is a function or class of Python itself, which its name tells."""
    return getattr(value, "__module__", None) == "builtins" and isinstance(
        value, type | types.BuiltinFunctionType
    )


def is_member(name: str, value: Any) -> bool:
    """Return whether a class's attribute decides on what its methods return."""
    if name.startswith("__") and name.endswith("__"):
        return isinstance(value, types.FunctionType)
    return not name.startswith("_abc_") and not isinstance(value, types.MemberDescriptorType)


def function_inside(value: Any) -> Any:
    """Return the function that a callable wraps, None where it wraps none."""
    inner = getattr(value, "__wrapped__", None)
    return inner if isinstance(inner, types.FunctionType) else None


def _slots(kind: type) -> list[str]:
    slots = vars(kind).get("__slots__", ())
    return [slots] if isinstance(slots, str) else list(slots)
