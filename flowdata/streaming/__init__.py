"""Weights for streams.

iterable.py reads a stream window by window and yields samples with their weights; source.py reads
this process's share of it; window_scorer.py makes each window's losses; temperature.py chooses its
temperature, from the median that running_median.py keeps of all losses so far; shared.py carries
the epoch to the copies of a stream in a loader's workers.
"""

from flowdata.streaming.iterable import FlowWeightedIterable

__all__ = ["FlowWeightedIterable"]
