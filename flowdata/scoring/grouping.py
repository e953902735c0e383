"""Grouping: which samples of a pack are collated together.

together    a b c d       one batch of the whole pack
alike       a b | c | d   only neighbours whose tensors have the same shapes: nothing is padded
alone       a | b | c | d each by itself: the truth, and the slowest
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
from torch import Tensor

Grouping = Callable[[Sequence[Any]], list[list[Any]]]  # samples to groups, in their order


def together(samples: Sequence[Any]) -> list[list[Any]]:
    """Return all samples as one group."""
    return [list(samples)]


def alone(samples: Sequence[Any]) -> list[list[Any]]:
    """Return every sample as a group."""
    return [[sample] for sample in samples]


def alike(samples: Sequence[Any]) -> list[list[Any]]:
    """Return neighbours of equal shapes as groups.

    Example:
        >>> alike([{"x": [1, 2]}, {"x": [3, 4]}, {"x": [5]}])
        [[{'x': [1, 2]}, {'x': [3, 4]}], [{'x': [5]}]]
    """
    groups: list[list[Any]] = []
    last: Any = None
    for sample in samples:
        shapes = shapes_of(sample)
        if groups and shapes == last:
            groups[-1].append(sample)
        else:
            groups.append([sample])
        last = shapes
    return groups


def shapes_of(value: Any) -> Any:
    """Return what two samples have in common that need no padding beside each other.

    Of tensors, arrays and lists of numbers it is the shape, of text the length, of containers the
    same of their entries.
    """
    if isinstance(value, Tensor | np.ndarray):
        return tuple(value.shape)
    if isinstance(value, str | bytes):
        return len(value)
    if isinstance(value, Mapping):
        return tuple((name, shapes_of(value[name])) for name in sorted(value, key=str))
    if isinstance(value, tuple | list):
        if value and isinstance(value[0], int | float):
            return (len(value),)
        return tuple(map(shapes_of, value))
    size = getattr(value, "size", None)  # of an image of PIL
    return (type(value).__name__, size if isinstance(size, tuple) else None)
