"""Real numbers as users have them: Python's, numpy's, fractions, and tensors of one number."""

from __future__ import annotations

from numbers import Real
from typing import Any, SupportsFloat, TypeAlias

import numpy as np
from torch import Tensor

RealNumber: TypeAlias = SupportsFloat


def real_number(value: Any, requirement: str, lowest: float, highest: float) -> float:
    """Return a real number of any type as a float.

    Args:
        value: an int, a float, a `Fraction`, a numpy number, or a 0-d tensor or array of one.
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
    number = as_python(value)
    is_number = isinstance(number, Real) and not isinstance(number, bool)
    if not is_number or not lowest <= float(number) <= highest:
        raise ValueError(f"{requirement}, got {value!r}")
    return float(number)


def as_python(value: Any) -> Any:
    """Return a numpy number, or the number in a 0-d tensor or array, as Python's; else `value`."""
    if isinstance(value, Tensor | np.ndarray | np.generic) and value.ndim == 0:
        return value.item()
    return value
