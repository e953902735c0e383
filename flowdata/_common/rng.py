"""The global random generators, and blocks of code that leave them as they were."""

from __future__ import annotations

import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import torch


@contextmanager
def preserved_rng(seed: int | None = None) -> Iterator[None]:
    """Restore the states of Python's, NumPy's and torch's generators after a block.

    Args:
        seed: in [0, 2^32), seeds all of them at the start of the block; None does not.
    """
    python_state, numpy_state = random.getstate(), np.random.get_state()  # noqa: NPY002
    # To ask for the state of a GPU's generator would start CUDA, which costs memory on each GPU and
    # forbids forking workers. If CUDA has not started, its generators have no state to restore.
    devices = list(range(torch.cuda.device_count())) if torch.cuda.is_initialized() else []
    try:
        with torch.random.fork_rng(devices=devices):
            if seed is not None:
                random.seed(seed)
                np.random.seed(seed)  # noqa: NPY002
                torch.manual_seed(seed)
            yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)  # noqa: NPY002
