"""The weights of several data sets, one after another, as of one."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from flowdata.scores.given import weights_of
from flowdata.scores.scores import Scores
from flowdata.weights import (
    Missing,
    Normalize,
    Temperature,
    shape_weights,
    warn_of_likely_losses,
    warn_of_useless_weights,
)


def gather_weights(
    scores_or_weights: Any,
    *,
    temperature: Temperature = "median",
    missing: Missing = "raise",
    normalize: Normalize = "none",
    max_weight: float | None = None,
) -> Tensor:
    """Return the weights of one data set, or of several one after another, as (N,) floating.

    The temperature is of each data set by itself, and for its scores alone. Normalising and
    capping concern all weights together, those that the user gives included: they are the last
    step, and the ratios between data sets stay as they are. Whether the weights of scores are of
    use is told of all together, too: one of several sets may rightly vanish beside the others.
    """
    several = scores_or_weights if is_several(scores_or_weights) else [scores_or_weights]
    parts = [weights_of(s, temperature=temperature, missing=missing) for s in several]
    _check_options_act(several, temperature, missing)
    pairs = [(s.losses, w) for s, w in zip(several, parts, strict=True) if isinstance(s, Scores)]
    if pairs:
        losses, weights = (_join(tensors) for tensors in zip(*pairs, strict=True))
        is_normalized = normalize == "mean"
        warn_of_useless_weights(losses, weights, temperature, is_normalized=is_normalized)
    given = [w for s, w in zip(several, parts, strict=True) if not isinstance(s, Scores)]
    if given:
        warn_of_likely_losses(_join(given))
    return shape_weights(_join(parts), normalize=normalize, max_weight=max_weight)


def is_several(scores_or_weights: Any) -> bool:
    """Return whether these are the scores or weights of several data sets, as a list of them.

    A list of numbers is the weights of one data set.
    """
    return (
        isinstance(scores_or_weights, list | tuple)
        and len(scores_or_weights) > 0
        and all(isinstance(s, Scores) or getattr(s, "ndim", 0) == 1 for s in scores_or_weights)
    )


def _check_options_act(several: Sequence[Any], temperature: Temperature, missing: Missing) -> None:
    """Raise ValueError for options of scores where weights alone are given."""
    if any(isinstance(each, Scores) for each in several):
        return
    options = {"temperature": (temperature, "median"), "missing": (missing, "raise")}
    for name, (value, default) in options.items():
        if value != default:
            raise ValueError(
                f"{name}={value!r} has no effect on weights, which are taken as they are: leave it "
                "out, or pass the scores that they were made of"
            )


def _join(parts: Sequence[Tensor]) -> Tensor:
    """Tensors one after another; a single one, such as a memory map, stays as it is."""
    return torch.cat(list(parts)) if len(parts) > 1 else parts[0]
