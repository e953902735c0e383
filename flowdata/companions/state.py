"""State dicts whose entries have to agree: their names, their shapes, and tied tensors."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

from torch import Tensor

StateDict: TypeAlias = Mapping[str, Tensor]
Shapes: TypeAlias = Mapping[str, list[int]]

# What `torch.compile`, FSDP, activation checkpointing and PEFT put into the names of parameters.
_WRAPPERS = {"_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "base_layer"}
_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output|decoder|output_projection)\.weight$"
)
_EMBEDDING = re.compile(r"(^|\.)(wte|shared|\w*embed\w*|\w+_embeddings?)\.weight$")
_OTHER_EMBEDDING = re.compile(r"position|type|pos_|patch|wpe")

_SCALED_IF_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano")
_TIES = ("scale_decoder_outputs", "tie_word_embeddings")


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


def tied_source(name: str, shape: list[int], shapes: Shapes, entries: StateDict) -> str | None:
    """Return the entry that an absent one is tied to, None where there is none or it is not clear.

    A file may say it itself: its metadata or its configuration. Else an output layer is tied to
    the one embedding of its shape, and an embedding to the one output layer.

    Args:
        name: of the absent entry.
        shape: of the absent entry in another state dict.
        shapes: of the entries that are there, by plain names.
        entries: these entries; a checkpoint has `tied_names` and `may_be_tied`.
    """
    source = getattr(entries, "tied_names", {}).get(name)
    if source is not None:
        return source if source in shapes else None
    if not getattr(entries, "may_be_tied", True):
        return None
    outer_bias = name.removesuffix(".decoder.bias") + ".bias"  # BERT's head has one under two names
    if name.endswith(".decoder.bias") and shapes.get(outer_bias) == shape:
        return outer_bias
    candidates = [
        other
        for other, other_shape in shapes.items()
        if other_shape == shape
        if (_is_embedding(name) or _HEAD.search(name))
        if (_is_embedding(other) or _HEAD.search(other))
    ]
    return candidates[0] if len(candidates) == 1 else None


def check_same_scaling(start: Mapping[str, Any], end: Mapping[str, Any]) -> None:
    """Raise ValueError where two configurations make other networks of the same weights.

    T5 and its kin scale what goes into an output layer that is tied, and only then.
    """
    differences = [key for key in _TIES if start.get(key, True) != end.get(key, True)]
    if differences and end.get("model_type") in _SCALED_IF_TIED:
        raise ValueError(
            f"pretrained and finetuned differ in {differences[0]} of their configurations, with "
            f"which {end['model_type']} scales what goes into its output layer: no average of "
            "weights lies between the two networks"
        )


def _is_embedding(name: str) -> bool:
    return bool(_EMBEDDING.search(name)) and not _OTHER_EMBEDDING.search(name)


def _tied_entries(shapes: Shapes, others: Shapes, entries: StateDict) -> dict[str, str]:
    """What each entry of `others` that `shapes` lacks is tied to, where that is clear."""
    sources = {
        name: tied_source(name, shape, shapes, entries)
        for name, shape in others.items()
        if name not in shapes
    }
    return {name: source for name, source in sources.items() if source is not None}
