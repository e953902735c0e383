"""Offsets: where each run of values begins in a flat tensor of several runs.

counts      2      0      3
values    a a           c c c
offsets   0     2 2           5
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowdata._common.large_array import large_array


def offsets_of(counts: Tensor) -> Tensor:
    """Return where each run begins, and where the last one ends: (N,) counts to (N + 1,) int64.

    Example:
        >>> offsets_of(torch.tensor([2, 0, 3]))
        tensor([0, 2, 2, 5])
    """
    return torch.cat([torch.zeros(1, dtype=torch.long, device=counts.device), counts.cumsum(0)])


def lengths_of(offsets: NDArray[np.int64]) -> NDArray[np.int32]:
    """Return the length of each run: (N + 1,) offsets to (N,).

    Example:
        >>> lengths_of(np.array([0, 2, 2, 5]))
        array([2, 0, 3], dtype=int32)
    """
    lengths = large_array(len(offsets) - 1, np.int32)
    np.subtract(offsets[1:], offsets[:-1], out=lengths, casting="unsafe")
    return lengths
