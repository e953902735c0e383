"""Importance resampling.

flow_sampler.py is the sampler that a loader takes: one rank's share of an epoch, resumed anywhere.
epoch_orders.py draws the order that all ranks share.
"""

from flowdata.sampler.flow_sampler import FlowSampler

__all__ = ["FlowSampler"]
