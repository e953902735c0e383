"""The weights of losses under a temperature, and what may be done to weights afterwards."""

from __future__ import annotations

import math
from typing import Literal, TypeAlias

from torch import Tensor

from flowdata._common.chunks import mean_of
from flowdata._common.real_numbers import real_number
from flowdata._common.values import Values, check_values
from flowdata.weights.formula import weigh
from flowdata.weights.notice import warn_of_useless_weights
from flowdata.weights.temperature import Temperature, resolve_temperature

Normalize: TypeAlias = Literal["none", "mean"]


def flow_weights(
    losses: Values,
    *,
    temperature: Temperature = "median",
    normalize: Normalize = "none",
    max_weight: float | None = None,
) -> Tensor:
    """Return the FLOW weight exp(−loss / temperature) of every sample.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, Algorithm 1.

    Under ``"ess…"`` the weights are exp(−(loss − smallest loss) / temperature), and the largest is
    exactly 1. Such a temperature follows the differences between losses, however large the losses
    are: without the shift, losses of 7 ± 0.05 nats would all weigh 0. The effective sample size is
    the same with the shift and without it.

    The weights of ``"median"``, ``"mean"``, a quantile and ``"ess…"`` are never all 0. Those of a
    float, or of what a callable returns, stay the paper's formula, which gives 0 to every loss
    beyond about 100 temperatures. Weights whose mean is below 0.001, and equal weights of losses
    that differ, are warned of once, with a rule that makes better ones.

    Args:
        losses: (N,) floating, non-negative: each sample's loss under the frozen pre-trained
            model, in nats.
        temperature: a positive float, or a rule for `resolve_temperature`.
        normalize: as in `shape_weights`; ``"none"`` leaves the weights as they are.
        max_weight: as in `shape_weights`; None sets no cap.

    Returns:
        (N,) float32 on the device of `losses`, in [0, 1] unless normalised. Detached; `losses`
        is left as it is.

    Raises:
        TypeError: `losses` is not floating.
        ValueError: `losses` is empty, not 1-D, negative or non-finite (first index named), or
            the temperature, `normalize` or `max_weight` is not usable.

    Example:
        >>> import torch
        >>> flow_weights(torch.tensor([0.0, 1.0, 2.0]), temperature=1.0)
        tensor([1.0000, 0.3679, 0.1353])
    """
    values = check_values(losses)
    weights = weigh(values, resolve_temperature(values, temperature))
    warn_of_useless_weights(values, weights, temperature, is_normalized=normalize == "mean")
    return shape_weights(weights, normalize=normalize, max_weight=max_weight)


def shape_weights(
    weights: Tensor, *, normalize: Normalize = "none", max_weight: float | None = None
) -> Tensor:
    """Return the weights normalised, then capped; as they are where neither is asked for.

    Args:
        weights: (N,) floating, non-negative.
        normalize: ``"mean"`` divides the weights by their mean, so that they average 1 and a
            learning rate tuned for the unweighted loss keeps its scale. Samples of weight 0
            count in the mean; weights that are all 0 stay so.
        max_weight: the largest weight that remains; larger ones become this one.

    Returns:
        (N,) of the dtype of `weights`: a new tensor, or `weights` itself where nothing changes.

    Raises:
        ValueError: `normalize` is neither ``"none"`` nor ``"mean"``, or `max_weight` is not
            positive.

    Example:
        >>> import torch
        >>> shape_weights(torch.tensor([1.0, 0.5, 0.0]), normalize="mean", max_weight=1.5)
        tensor([1.5000, 1.0000, 0.0000])
    """
    if normalize not in ("none", "mean"):
        raise ValueError(f"normalize must be 'none' or 'mean', got {normalize!r}")
    if max_weight is not None:
        max_weight = real_number(max_weight, "max_weight must be positive", math.ulp(0.0), math.inf)
    if normalize == "mean" and (largest := weights.max().item()) > 0:
        # The mean of small float32 weights may lie below what float32 holds, and the sum of large
        # ones above; relative to the largest weight it lies between 1 / N and 1.
        weights = weights / largest
        weights = weights / mean_of(weights)
    return weights if max_weight is None else weights.clamp(max=max_weight)
