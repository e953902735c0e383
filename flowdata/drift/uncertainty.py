"""How uncertain the difference of two drifts is, both measured on the same samples."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdata.drift.drift import Drift


def variance_of_difference(drift: Drift, other: Drift, measure: str) -> float:
    """Return the variance of the difference of two drifts' measures; 0 where none tells.

    It is that of the samples' differences, since the probe is the same.

    Args:
        drift: of one run.
        other: of another, by the same meter.
        measure: a name in `Drift.per_sample`.
    """
    if measure not in drift.per_sample or measure not in other.per_sample:
        return 0.0
    differences = drift.per_sample[measure] - other.per_sample[measure]
    counts = drift.per_sample.get("targets", torch.ones_like(differences))
    return _variance_of_mean(differences, counts)


def _variance_of_mean(values: Tensor, counts: Tensor) -> float:
    """The variance of the mean over all targets, from the means of samples; 0 where none tells.

    Samples are drawn, not targets, so that the mean is a ratio of two sums over samples (Cochran,
    1977); where all have as many targets the variance is that of a mean.

    Args:
        values: (N,) floating means; what is not finite, as without a target, is left out.
        counts: (N,) targets of each sample.
    """
    is_finite = values.isfinite()
    values, counts = values[is_finite].double(), counts[is_finite].double()
    size, total = len(values), counts.sum()
    if size < 2 or not total:
        return 0.0
    off = counts * (values - (counts * values).sum() / total)
    return float(off.square().sum() / total**2) * size / (size - 1)
