"""The model lent for a run: its copy, threads, rotary frequencies, adapters, compiled layers."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager, contextmanager
from typing import Any

import torch


@contextmanager
def torch_threads(number: int) -> Iterator[None]:
    """Compute with so many threads: on a CPU the last bits of a loss depend on it."""
    before = torch.get_num_threads()
    torch.set_num_threads(number)
    try:
        yield
    finally:
        torch.set_num_threads(before)


def adapters_off(model: Any) -> AbstractContextManager[None]:
    """Turn a PEFT model's adapters off for a block."""
    off: AbstractContextManager[None] = model.disable_adapter()
    return off
