"""Real numbers as users have them: Python's, numpy's, fractions, and tensors of one number."""

from __future__ import annotations

import math
import numbers
import sys
from decimal import Decimal
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
from torch import Tensor

RealNumber: TypeAlias = SupportsFloat


def real_number(value: Any, requirement: str, lowest: float, highest: float) -> float:
    """Return a real number of any type as a float.

    Args:
        value: an int, a float, a `Fraction`, a numpy number, or a tensor or array of one.
        requirement: the beginning of messages, as "alpha must lie between 0 and 1".
        lowest: the least that it may be.
        highest: the most.

    Raises:
        ValueError: it is no real number (bools and NaN are none), lies outside, or is a tensor
            that requires a gradient, which would be lost.

    Example:
        >>> from fractions import Fraction
        >>> real_number(Fraction(1, 4), "alpha must lie between 0 and 1", 0, 1)
        0.25
    """
    if isinstance(value, Tensor) and value.requires_grad:
        raise ValueError(f"{requirement}, got a tensor whose gradient would be lost; detach() it")
    number = as_float(value)
    if number is None or not lowest <= number <= highest:
        raise ValueError(f"{requirement}, got {value!r}")
    return number


def check_factor(name: str, value: Any) -> float:
    """Return what a user lets a term count, as a float: any finite number from 0 on.

    Args:
        name: of the argument, for messages.
        value: see `real_number`.

    Raises:
        ValueError: it is no finite real number, or is below 0.

    Example:
        >>> check_factor("strength", np.float32(0.5))
        0.5
    """
    return real_number(value, f"{name} must be finite and >= 0", 0, sys.float_info.max)


def as_float(value: object) -> float | None:
    """Return a real number of any type as a float, and None for anything else.

    A truth value is no number here. A float stays what it is, also one of a class of its own.

    Example:
        >>> as_float(np.float32(0.5)), as_float(True), as_float("0.5")
        (0.5, None, None)
    """
    value = as_python(value)
    if isinstance(value, bool) or not isinstance(value, numbers.Real | Decimal):
        return None
    try:
        return value if isinstance(value, float) else float(value)
    except OverflowError:  # an integer or a fraction whose size no float holds
        return math.inf


def as_python(value: Any) -> Any:
    """Return the number of numpy, or in a tensor or array of one, as Python's; else `value`."""
    is_array = isinstance(value, Tensor | np.ndarray | np.generic)
    return value.item() if is_array and math.prod(value.shape) == 1 else value
