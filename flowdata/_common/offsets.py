"""Offsets: where each run of values begins in a flat tensor of several runs.

counts      2      0      3
values    a a           c c c
offsets   0     2 2           5
"""

from __future__ import annotations

import torch
from torch import Tensor


def offsets_of(counts: Tensor) -> Tensor:
    """Return where each run begins, and where the last one ends: (N,) counts to (N + 1,) int64.

    Example:
        >>> offsets_of(torch.tensor([2, 0, 3]))
        tensor([0, 2, 2, 5])
    """
    return torch.cat([torch.zeros(1, dtype=torch.long, device=counts.device), counts.cumsum(0)])
