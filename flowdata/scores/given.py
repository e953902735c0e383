"""Scores, or weights in their place, as a caller gives them."""

from __future__ import annotations

from pathlib import Path

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowdata._common.values import check_values
from flowdata.scores.scores import Scores
from flowdata.weights import Missing, Temperature, weigh_present


def weights_of(
    scores_or_weights: Scores | Tensor | NDArray[np.floating] | list[float],
    *,
    temperature: Temperature = "median",
    missing: Missing = "raise",
) -> Tensor:
    """Return the (N,) weights of scores, or weights given directly, checked and not copied.

    Weights are taken as they are: `temperature` and `missing` concern scores alone. Whether the
    scores' weights are of use is left to the caller, who may have several.

    Raises:
        TypeError, ValueError: weights of a wrong dtype or shape, negative or non-finite (first
            index named), the `losses` of scores, and every error of `Scores.weights`.
    """
    if isinstance(scores_or_weights, Scores):
        return weigh_present(scores_or_weights.losses, temperature, missing=missing)
    if isinstance(scores_or_weights, str | Path):
        name = str(scores_or_weights)  # "auto" is a word that the trainers alone can follow
        call = "LossScorer(model).score(dataset)" if name == "auto" else f"Scores.load({name!r})"
        raise TypeError(
            f"scores_or_weights must be scores or weights, got {name!r}; pass flowdata.{call}"
        )
    if hasattr(scores_or_weights, "score"):
        raise TypeError(
            "scores_or_weights must be scores or weights, got "
            f"{type(scores_or_weights).__name__}; pass what its score(dataset) returns"
        )
    if getattr(scores_or_weights, "are_losses", False):
        raise ValueError(
            "scores_or_weights is the losses of scores, where weights belong, so that the hardest "
            "samples would count most; pass the scores themselves, or flow_weights(losses); "
            "weights that are to grow with the loss are a tensor of their own, losses.clone()"
        )
    return check_values(scores_or_weights, name="weights")
