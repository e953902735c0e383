"""The process group of a command that torchrun started."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flowdata.scoring.ranks import of_this_attempt

_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def process_group() -> Iterator[str | None]:
    """Join the process group of torchrun's processes; gives the device that this rank uses.

    Outside torchrun there is no group to join, and the device is None: the model's own.
    """
    if not os.environ.keys() >= _TORCHRUN:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous  # not in every build of PyTorch

    device = None
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    # The keys that ranks exchange may outlive a restart, and `init_process_group` alone would take
    # those of the attempt before for its own. So each attempt gets a part of the keys to itself.
    key_values, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=of_this_attempt(key_values),
        rank=rank,
        world_size=size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
