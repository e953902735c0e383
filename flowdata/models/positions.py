"""Positions: how long samples can be for a model that has learned a vector for each position."""

from __future__ import annotations

from typing import Any

from torch import nn

from flowdata.models.calling import innermost


def check_positions(model: nn.Module, length: int) -> None:
    """Refuse a sample longer than the positions that a model has learned.

    Without this a CPU would say that an index is out of range, and a GPU that it was aborted.

    Args:
        model: the model; one of Hugging Face's tells its positions.
        length: tokens of the sample.

    Raises:
        ValueError: there are more tokens than positions.
    """
    inner = innermost(model)
    config: Any = getattr(inner, "config", None)
    most = getattr(config, "max_position_embeddings", None)
    if not isinstance(most, int) or length <= most:
        return
    learns_positions = any(
        isinstance(module, nn.Embedding) and most <= module.num_embeddings <= most + 2
        for name, module in inner.named_modules()
        if "pos" in name or "wpe" in name
    )
    if learns_positions:
        raise ValueError(
            f"a sample has {length:,} tokens and the model {most:,} positions "
            "(max_position_embeddings); cut the samples to that length"
        )
