"""Chunks: float64 arithmetic on millions of values without a float64 copy of them all."""

from __future__ import annotations

from torch import Tensor, float64

CHUNK = 1 << 20  # elements per float64 temporary: 8 MiB, whatever the number of samples


def mean_of(values: Tensor) -> float:
    """Return the mean of values, (N,) floating, N > 0, summed in float64.

    Example:
        >>> import torch
        >>> mean_of(torch.tensor([1.0, 2.0, 6.0]))
        3.0
    """
    total: float = sum(part.sum(dtype=float64).item() for part in values.split(CHUNK))
    return total / len(values)
