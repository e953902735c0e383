"""The vocabulary: whether a batch's tokens are the model's."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from flowdata.errors import OutOfRangeError
from flowdata.models.calling import innermost, input_layer_of, output_layer_of
from flowdata.models.positions import check_positions
from flowdata.scoring.language.work import Work


def check_vocabulary(model: nn.Module, work: Work) -> None:
    """Refuse tokens that the model doesn't have; a GPU would only say that it was aborted.

    Raises:
        ValueError: an input token without an embedding, or a target without a logit.
    """
    inner = innermost(model)
    embedding = input_layer_of(inner)
    # A model that takes images as well may have ids beyond its vocabulary stand for them.
    ids = work.inputs.get("input_ids")
    if ids is not None and not _takes_more_than_text(inner):
        _check_tokens("input_ids", ids, embedding, "num_embeddings")
        positions = work.inputs.get("position_ids")
        check_positions(inner, ids.shape[-1] if positions is None else int(positions.max()) + 1)
    _check_tokens("labels", work.targets, output_layer_of(model), "out_features")


def _takes_more_than_text(model: Any) -> bool:
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def _check_tokens(field: str, ids: Tensor, layer: nn.Module | None, size_name: str) -> None:
    size = getattr(layer, size_name, None)
    if size is None:
        return
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise OutOfRangeError(
            f"{field} must be tokens of the model, from 0 to {size - 1}, got {int(outside[0])}; "
            "is the tokenizer the model's own?",
            field=field,
            high=size - 1,
        )
