"""The median of values that pass by once and are not stored."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

RELATIVE_ERROR = 1e-3  # the largest possible error of the median
_LOG_WIDTH = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_ZERO = -(2**31)  # the bucket of zeros, whose logarithm is −∞: it comes before all others


class RunningMedian:
    """The median of all values counted so far, within 0.1 % of its value, in bounded memory.

    Source: DDSketch (Masson, Rim and Lee, VLDB 2019). Buckets have equal relative widths; value
    v > 0 is counted in bucket ceil(log v / log γ), with γ = (1 + 0.001) / (1 − 0.001)::

        ─┤ bucket k − 1 ├──── bucket k ────┤ bucket k + 1 …
                      γ^(k−1)     ×       γ^k
                      × stands for all values of the bucket, each within 0.1 % of it

    Nothing in it is random, unlike in the KLL sketch, so that a resumed stream gets the same
    median. Merging is exact: the counts of parts add up to the counts of the whole. Values over
    nine decades take at most 10,400 counts.

    Example:
        >>> import torch
        >>> running = RunningMedian()
        >>> running.update(torch.tensor([1.0, 2.0, 4.0]))
        >>> round(running.median(), 2)
        2.0
    """

    def __init__(self, counts: Mapping[int, int] | None = None) -> None:
        self.counts = Counter(counts or {})

    def __add__(self, other: RunningMedian) -> RunningMedian:
        """Return the running median of both objects' values together."""
        return RunningMedian(self.counts + other.counts)

    def update(self, values: Tensor) -> None:
        """Count values: (K,) floating, finite, >= 0."""
        buckets = (values.double().log() / _LOG_WIDTH).ceil().clamp(min=_ZERO).long()
        numbers, counts = buckets.unique(return_counts=True)
        self.counts.update(dict(zip(numbers.tolist(), counts.tolist(), strict=True)))

    def median(self) -> float:
        """Return the mean of the two middle values, each within 0.1 % of its own.

        Raises:
            ValueError: nothing has been counted yet.
        """
        total = self.counts.total()
        if not total:
            raise ValueError("no value has been counted yet: there is no median")
        # In rising order the values of a bucket take the places start … start + count − 1. The
        # median is the mean of the two middle places, which are one and the same for an odd total.
        lower, upper = (total - 1) // 2, total // 2
        middle_values = []
        start = 0
        for bucket, count in sorted(self.counts.items()):
            places = range(start, start + count)
            middle_values += [_value(bucket)] * ((lower in places) + (upper in places))
            start += count
        return sum(middle_values) / 2


def _value(bucket: int) -> float:
    """The value that stands for a bucket: it differs from each end by 0.1 % of that end."""
    if bucket == _ZERO:
        return 0.0
    return math.exp(bucket * _LOG_WIDTH) * (1 - RELATIVE_ERROR)
