"""State dicts whose names and shapes have to agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, list[int]]


def check_shapes(
    shapes: Shapes, others: Shapes, name: str, other_name: str, *, may_have_more: bool = False
) -> None:
    """Check that two state dicts have the same names with the same shapes.

    Args:
        shapes: of the first.
        others: of the second.
        name: what messages call the first.
        other_name: what messages call the second.
        may_have_more: whether the first may have names that the second lacks.

    Raises:
        ValueError: a name is in one of them only, or its shapes differ; the first is named.
    """
    absent_here = [entry for entry in others if entry not in shapes]
    absent_there = [] if may_have_more else [entry for entry in shapes if entry not in others]
    for entries, lacking, having in (
        (absent_here, name, other_name),
        (absent_there, other_name, name),
    ):
        if entries:
            raise ValueError(
                f"{lacking} lacks {entries[0]!r}, which {having} has ({len(entries)} such names); "
                "the names must agree: check prefixes, merge adapters, leave out new heads"
            )
    for entry, shape in others.items():
        if shapes[entry] != shape:
            raise ValueError(
                f"{entry!r} has shape {tuple(shapes[entry])} in {name} and {tuple(shape)} in "
                f"{other_name}; leave a head that was exchanged out of both"
            )


def shapes_of(entries: StateDict) -> Shapes:
    """Return the shape of every tensor by name; entries that are no tensors are left out."""
    return {name: list(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}
