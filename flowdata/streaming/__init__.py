"""Weights for streams.

iterable.py scores a stream window by window and yields samples with their weights; source.py reads
this process's share of it; temperature.py chooses each window's temperature, from the median that
running_median.py keeps of all losses so far.
"""

from flowdata.streaming.iterable import FlowWeightedIterable

__all__ = ["FlowWeightedIterable"]
