"""The values of scores: their shapes, and float32 with NaN for what is not finite."""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import torch
from torch import Tensor

from flowdata._common.chunks import CHUNK
from flowdata.store.format import STORE_TENSORS


def check_shapes(
    losses: Tensor, counts: Tensor, token_losses: Tensor | None, columns: Mapping[str, Tensor]
) -> None:
    """Raise ValueError for counts that are none, or values not one for each sample or target."""
    shape = tuple(losses.shape)
    if counts.shape != shape:
        raise ValueError(f"counts must have shape {shape}, got {tuple(counts.shape)}")
    is_whole = not (counts.is_floating_point() or counts.is_complex() or counts.dtype == torch.bool)
    if not is_whole or (counts < 0).any():
        raise ValueError(
            "counts must be integers from 0 on, the numbers of targets, got "
            f"{counts.dtype}{f' with {int(counts.min())}' if is_whole else ''}"
        )
    if token_losses is not None and token_losses.shape != (int(counts.sum()),):
        raise ValueError(
            f"token_losses must have shape ({int(counts.sum())},), one value for each target that "
            f"counts tells of, got {tuple(token_losses.shape)}"
        )
    if taken := STORE_TENSORS.intersection(columns):
        raise ValueError(f"columns must not be named {min(taken)!r}: scores hold that themselves")
    for name, values in columns.items():
        if np.shape(values) != shape:
            raise ValueError(
                f"columns[{name!r}] must have shape {shape}, got {tuple(np.shape(values))}"
            )


def finite_float32(values: Tensor) -> Tensor:
    """Return a copy of values as float32, NaN where that is not finite; on the CPU, detached."""
    single = torch.as_tensor(values).detach().to("cpu", torch.float32, copy=True)
    for part in single.split(CHUNK):
        part.masked_fill_(~part.isfinite(), torch.nan)
    return single
