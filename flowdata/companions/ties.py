"""Tied weights: which entry an absent one stands for, and which networks scale by their ties.

A file keeps a tensor that two layers share under one of its names.
"""

from __future__ import annotations

import re
from collections.abc import Mapping
from typing import Any

from torch import Tensor

_HEAD = re.compile(
    r"(^|\.)(lm_head(\.decoder)?|embed_out|output|decoder|output_projection)\.weight$"
)
_EMBEDDING = re.compile(r"(^|\.)(wte|shared|\w*embed\w*|\w+_embeddings?)\.weight$")
_OTHER_EMBEDDING = re.compile(r"position|type|pos_|patch|wpe")

_SCALED_IF_TIED = ("t5", "mt5", "umt5", "longt5", "switch_transformers", "udop", "pop2piano")
_TIES = ("scale_decoder_outputs", "tie_word_embeddings")


def tied_source(
    name: str, shape: list[int], shapes: Mapping[str, list[int]], entries: Mapping[str, Tensor]
) -> str | None:
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
    if not _is_embedding_or_head(name):
        return None
    candidates = [
        other
        for other, other_shape in shapes.items()
        if other_shape == shape and _is_embedding_or_head(other)
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


def _is_embedding_or_head(name: str) -> bool:
    is_embedding = _EMBEDDING.search(name) and not _OTHER_EMBEDDING.search(name)
    return bool(is_embedding or _HEAD.search(name))
