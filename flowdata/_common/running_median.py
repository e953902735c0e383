"""The median of values that pass by once and are not kept."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping

from torch import Tensor

RELATIVE_ERROR = 1e-3  # of the median, always
_LOG_WIDTH = math.log((1 + RELATIVE_ERROR) / (1 - RELATIVE_ERROR))
_ZERO = -(2**31)  # the bucket of zeros, whose logarithm is −∞: before all others


class RunningMedian:
    """The median of all values counted so far, within 0.1 % of its value, in bounded memory.

    Source: DDSketch (Masson, Rim and Lee, VLDB 2019). Buckets have equal relative widths; value
    v > 0 is counted in bucket ceil(log v / log γ), with γ = (1 + 0.001) / (1 − 0.001)::

        ─┤ bucket k − 1 ├──── bucket k ────┤ bucket k + 1 …
                      γ^(k−1)     ×       γ^k
                      × stands for all values of the bucket, each within 0.1 % of it

    Unlike the randomised KLL sketch it gives the same median again after a resumption, and
    merging is exact: sketches of parts add up to the sketch of the whole. Values over nine
    decades take at most 10,400 counts.

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
        """Return the sketch of the values of both together."""
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
        # In the order of their values, a bucket holds the places start … start + count. The two
        # middle places are the same one if the total is odd.
        lower, upper = (total - 1) // 2, total // 2
        middle = []
        start = 0
        for bucket, count in sorted(self.counts.items()):
            places = range(start, start + count)
            middle += [_value(bucket)] * ((lower in places) + (upper in places))
            start += count
        return sum(middle) / 2


def _value(bucket: int) -> float:
    """The value that stands for a bucket: both of its ends are 0.1 % of their value away."""
    if bucket == _ZERO:
        return 0.0
    return math.exp(bucket * _LOG_WIDTH) * (1 - RELATIVE_ERROR)
