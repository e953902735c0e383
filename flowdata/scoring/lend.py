"""The model as it is run: lent for a block, and given back exactly as it came."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager, nullcontext
from typing import Any

import torch
from torch import nn

from flowdata.models.as_loaded import as_loaded
from flowdata.models.compiled import compiled_layers
from flowdata.models.copies import frozen_model
from flowdata.models.placement import reshard
from flowdata.scoring.job import Job
from flowdata.scoring.plan.packs import PlanOptions


@contextmanager
def lent_model(job: Job, options: PlanOptions) -> Iterator[nn.Module]:
    """Give a job's model as it is run, for a block.

    Args:
        job: whose model it is; it says the dtype, the device, and whether adapters are off.
        options: the plan's: PyTorch's threads, and whether layers are compiled.
    """
    with ExitStack() as stack:
        stack.enter_context(_torch_threads(options.threads))
        model = stack.enter_context(frozen_model(job.model, job.dtype, job.device))
        stack.enter_context(as_loaded(model))
        stack.enter_context(adapters_of(job.reference, model))
        if options.compile:
            stack.enter_context(compiled_layers(model))
        yield model
        reshard(job.model)  # all ranks are through; after an error some may still call the model


@contextmanager
def _torch_threads(number: int) -> Iterator[None]:
    """Let PyTorch compute with a number of threads: a loss's last bits depend on it on a CPU."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adapters_of(reference: str, model: Any) -> AbstractContextManager[None]:
    """Return what turns a PEFT model's adapters off for a block if the reference is its base."""
    off: AbstractContextManager[None] = (
        model.disable_adapter() if reference == "base" else nullcontext()
    )
    return off
