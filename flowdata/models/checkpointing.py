"""Activation checkpointing, left off for a block."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from types import SimpleNamespace
from typing import Any

from torch.utils import checkpoint


@contextmanager
def without_checkpointing() -> Iterator[None]:
    """Let `torch.utils.checkpoint` keep what a forward in the block makes, and run nothing again.

    A checkpoint runs its part of the model again in the backward pass, after the block and so in
    the mode of then: gradients of a forward in eval mode would be those of training. Hugging Face's
    models checkpoint nothing in eval mode.
    """
    library: Any = checkpoint
    before = library._checkpoint_hook, library.CheckpointFunction
    # Both kinds of checkpoint look these up when they are called. Without the hook autograd keeps
    # tensors as ever; the function's place is taken by a plain call.
    library._checkpoint_hook = lambda frame: nullcontext()
    library.CheckpointFunction = SimpleNamespace(apply=lambda call, _, *inputs: call(*inputs))
    try:
        yield
    finally:
        library._checkpoint_hook, library.CheckpointFunction = before
