"""State dicts: names and shapes that must agree."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TypeAlias

from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, list[int]]


def check_shapes(ours: Shapes, theirs: Shapes, our: str, their: str, *, more: bool = False) -> None:
    """All of their names are ours, with the same shape; so are ours theirs, unless `more`."""
    missing = [name for name in theirs if name not in ours]
    extra = [] if more else [name for name in ours if name not in theirs]
    for names, lacking, having in ((missing, our, their), (extra, their, our)):
        if names:
            raise ValueError(
                f"{lacking} lacks {names[0]!r}, which {having} has ({len(names)} such names); "
                "the names must agree: check prefixes, merge adapters, leave out new heads"
            )
    for name, shape in theirs.items():
        if ours[name] != shape:
            raise ValueError(
                f"{name!r} has shape {tuple(ours[name])} in {our} and {tuple(shape)} in {their}; "
                "leave a head that was exchanged out of both"
            )


def shapes_of(entries: StateDict) -> Shapes:
    """Return the shape of every tensor by name."""
    return {name: list(value.shape) for name, value in entries.items() if isinstance(value, Tensor)}
