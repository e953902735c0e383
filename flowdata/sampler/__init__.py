"""Importance resampling.

flow_sampler.py is the sampler that a loader takes: one rank's share of an epoch, resumed anywhere.
epoch_orders.py draws the order that all ranks share.
loaded_data.py compares its weights with the data set of the loader that asks for indices.
carried_weights.py finds the weights that a data set carries.
sharing.py knows who shares it out: the sampler, or the loader that Accelerate prepared.
"""

from flowdata.sampler.flow_sampler import FlowSampler

__all__ = ["FlowSampler"]
