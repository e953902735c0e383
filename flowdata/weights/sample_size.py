"""How many samples weights amount to."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

from flowdata._common.chunks import CHUNK
from flowdata._common.values import Values, check_values


def effective_sample_size(weights: Values) -> float:
    """Return the effective sample size (Σw)² / Σw², between 1 and N.

    Source: Kish, Survey Sampling (1965).

    Args:
        weights: (N,) floating, non-negative, not all zero; any scale.

    Raises:
        TypeError: `weights` is not floating.
        ValueError: `weights` is empty, not 1-D, negative, non-finite or all zero.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        2.0
    """
    values = check_values(weights, name="weights")
    largest = values.max().item()
    if largest == 0:
        raise ValueError("weights are all zero: an effective sample size needs one positive weight")
    return math.exp(log_sample_size(values, lambda part: part.div_(largest)))


def log_sample_size(values: Tensor, weigh: Callable[[Tensor], Tensor]) -> float:
    """Return log((Σw)² / Σw²) of w = weigh(values), summed in float64 chunks."""
    total = squares = 0.0
    for part in values.split(CHUNK):
        weights = weigh(part.to(torch.float64, copy=True))
        total += weights.sum().item()
        squares += weights.square_().sum().item()
    return 2 * math.log(total) - math.log(squares)
