"""State dicts whose entries have to agree: in their names and their shapes."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import NamedTuple, TypeAlias

from torch import Tensor

from flowdata.companions.ties import tied_source

StateDict: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, list[int]]

# What `torch.compile`, FSDP, activation checkpointing and PEFT put into the names of parameters.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}


class Match(NamedTuple):
    """An entry that two state dicts have, maybe under other names.

    Attributes:
        name: of the entry in the result.
        start: its name in the first state dict.
        end: its name in the second.
    """

    name: str
    start: str
    end: str


def plain_names(names: Iterable[str]) -> dict[str, str]:
    """Return the names of a state dict's entries by those that they have without wrappers.

    `torch.compile`, FSDP, activation checkpointing and PEFT add parts to names, DataParallel and
    DistributedDataParallel the prefix ``module.``.

    Example:
        >>> plain_names(["module._orig_mod.weight", "module._orig_mod.bias"])
        {'weight': 'module._orig_mod.weight', 'bias': 'module._orig_mod.bias'}
    """
    originals = list(names)
    plain = [".".join(p for p in name.split(".") if p not in _WRAPPERS) for name in originals]
    while plain and all(name.startswith("module.") for name in plain):
        plain = [name.removeprefix("module.") for name in plain]
    if len(set(plain)) < len(plain):
        plain = originals  # two entries differ in such a part alone, which is the user's own
    return dict(zip(plain, originals, strict=True))


def match_entries(
    pretrained: StateDict, finetuned: StateDict, names: tuple[str, str]
) -> list[Match]:
    """Return the entries that two state dicts have, in the order of the second.

    An entry that one of them lacks because it is tied there (an output layer that shares the
    embedding's weights is kept once in a file) is the entry that it is tied to.

    Args:
        pretrained: the first.
        finetuned: the second; it gives the names.
        names: what messages call the two.

    Raises:
        ValueError: a name is in one of them only, or shapes differ; the first is named.
    """
    starts, ends = plain_names(pretrained), plain_names(finetuned)
    shapes = shapes_of({plain: pretrained[name] for plain, name in starts.items()})
    others = shapes_of({plain: finetuned[name] for plain, name in ends.items()})
    tied_starts = _tied_entries(shapes, others, pretrained)
    tied_ends = _tied_entries(others, shapes, finetuned)
    shapes.update({name: shapes[source] for name, source in tied_starts.items()})
    others.update({name: others[source] for name, source in tied_ends.items()})
    check_shapes(shapes, others, *names)
    return [
        Match(
            ends.get(plain) or starts[plain],
            starts[tied_starts.get(plain, plain)],
            ends[tied_ends.get(plain, plain)],
        )
        for plain in others
    ]


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


def shapes_of(entries: StateDict) -> dict[str, list[int]]:
    """Return the shape of every tensor by name."""
    return {name: list(value.shape) for name, value in entries.items()}


def _tied_entries(shapes: Shapes, others: Shapes, entries: StateDict) -> dict[str, str]:
    """What each entry of `others` that `shapes` lacks is tied to, where that is clear."""
    sources = {
        name: tied_source(name, shape, shapes, entries)
        for name, shape in others.items()
        if name not in shapes
    }
    return {name: source for name, source in sources.items() if source is not None}
