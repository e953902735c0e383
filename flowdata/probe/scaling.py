"""Standardised columns of features and values, and the way back to a head for them as they are."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from flowdata._common.notices import logger

ROWS = 8192  # rows in float64 at a time; all of them would take twice the memory of the features


@dataclass(frozen=True)
class Columns:
    """The mean that is taken from each column, and the scale that it is divided by.

    Attributes:
        means: (D,) float64; 0 where columns are not centred.
        scales: (D,) float64; infinite for a column that does not vary, which becomes 0.
    """

    means: Tensor
    scales: Tensor

    def standardise(self, values: Tensor) -> Tensor:
        """Return (N, D) values in float32 or wider with the mean taken out, of variance 1."""
        dtype = torch.promote_types(values.dtype, torch.float32)
        scaled = torch.empty(values.shape, dtype=dtype, device=values.device)
        for target, rows in zip(scaled.split(ROWS), values.split(ROWS), strict=True):
            target.copy_((rows.double() - self.means) / self.scales)
        return scaled


def measure_columns(features: Tensor, *, centre: bool, rounding: float) -> Columns:
    """Return the means and the scales of features: each column's own standard deviation.

    Two kinds of columns have no scale of their own. One that varies by no more than its values are
    rounded says nothing; it becomes 0, and so does its weight. One in which a single sample differs
    from all others would get a weight that no held-out sample can check and that fine-tuning, once
    the feature moves, multiplies; its scale is at least that of the features on average.

    Args:
        features: (N, D) floating, finite.
        centre: whether the means are taken out; a head without bias can't put them back, and
            then the scale is the root of the mean square.
        rounding: of a value, relative to it: the machine epsilon of the head's dtype.
    """
    samples, width = features.shape
    lows, highs = (edge.double() for edge in torch.aminmax(features, dim=0))
    means = features.new_zeros(width, dtype=torch.float64)
    if centre:
        means = features.mean(0, dtype=torch.float64)
    peaks = _largest_deviations(highs - means, means - lows)
    noise = 2 * rounding * torch.maximum(lows.abs(), highs.abs())
    squares, at_low, at_high = (torch.zeros_like(means) for _ in range(3))
    for part in features.split(ROWS):
        rows = part.double()
        at_low += (rows <= (lows + noise if centre else 0)).sum(0)
        at_high += (rows >= (highs - noise if centre else 0)).sum(0)
        squares += ((rows - means) / peaks).square_().sum(0)
    scales = peaks * (squares / samples).sqrt()
    is_constant = scales <= (2 * rounding * means.abs() if centre else 0)
    _say_what_is_lost(is_constant & (lows < highs))
    if is_constant.all():
        return Columns(means, torch.full_like(scales, torch.inf))
    typical = scales[~is_constant].max()
    typical = typical * (scales[~is_constant] / typical).square().mean().sqrt()
    # Without a mean to take out, a column's one sample stands alone where all others are 0.
    alike = torch.maximum(at_low, at_high) if centre else torch.minimum(at_low, at_high)
    scales = torch.where(alike >= samples - 1, torch.maximum(scales, typical), scales)
    return Columns(means, torch.where(is_constant, torch.inf, scales))


def measure_values(values: Tensor, *, centre: bool) -> Columns:
    """Return the means and the scales of a regression's values, (N, C) float64.

    In these units the outputs of a head matter alike to the solver and to the held-out loss,
    wherever their values lie; the solution is the same, as the penalty has the units of the loss.
    """
    means = values.mean(0) if centre else torch.zeros_like(values[0])
    deviations = values - means
    peaks = _largest_deviations(deviations.amax(0), -deviations.amin(0))
    scales = peaks * (deviations / peaks).square().mean(0).sqrt()
    return Columns(means, torch.where(scales > 0, scales, 1.0))


def _largest_deviations(above: Tensor, below: Tensor) -> Tensor:
    """The largest of each column, or 1: divided by it, squares neither over- nor underflow."""
    peaks = torch.maximum(above, below)
    return torch.where(peaks > 0, peaks, 1.0)


def _say_what_is_lost(is_lost: Tensor) -> None:
    """Warn of columns that vary, but by too little for the head to see it."""
    if is_lost.any():
        logger.warning(
            "features[:, %d] varies by no more than the head's dtype rounds its mean (%d of %d "
            "features) and gets no weight; if it matters, take the mean out, or give a float64 "
            "head and features",
            int(is_lost.int().argmax()),
            int(is_lost.sum()),
            len(is_lost),
        )
