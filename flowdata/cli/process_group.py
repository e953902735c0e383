"""The process group that torchrun began."""

from __future__ import annotations

import os
from collections.abc import Iterator
from contextlib import contextmanager

from flowdata.scoring.ranks import of_this_attempt

_TORCHRUN = {"RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"}


@contextmanager
def process_group() -> Iterator[str | None]:
    """Join the process group that torchrun began, if it did; gives this rank's device."""
    if not os.environ.keys() >= _TORCHRUN:
        yield None
        return
    import torch
    import torch.distributed as dist
    from torch.distributed.rendezvous import rendezvous

    device = None
    if torch.cuda.is_available():
        device = f"cuda:{int(os.environ['LOCAL_RANK']) % torch.cuda.device_count()}"
        torch.cuda.set_device(device)
    store, rank, size = next(rendezvous("env://"))
    dist.init_process_group(
        "gloo" if device is None else "cpu:gloo,cuda:nccl",
        store=of_this_attempt(store),
        rank=rank,
        world_size=size,
    )
    try:
        yield device
    finally:
        dist.destroy_process_group()
