"""A classifier's right answers, sample by sample, and their share."""

from __future__ import annotations

import base64
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader


@torch.no_grad()
def hits(model: nn.Module, data: Any, dtype: str = "float32", workers: int = 0) -> Tensor:
    """Return which answers are right, (N,) bool.

    Args:
        model: inputs (B, …) → logits (B, C); left in eval mode.
        data: map-style, samples (input, class).
        dtype: as for `fine_tune`.
        workers: as for `fine_tune`.
    """
    device = next(model.parameters()).device
    loader = DataLoader(data, batch_size=256, num_workers=workers)
    model.eval()
    with autocast(device, dtype):
        return torch.cat([model(x.to(device)).argmax(1).cpu() == y for x, y in loader])


def accuracy(model: nn.Module, data: Any, dtype: str = "float32", workers: int = 0) -> float:
    """Return the share of right answers, in %; the arguments are those of `hits`."""
    return 100 * hits(model, data, dtype, workers).double().mean().item()


def packed(hits: Tensor) -> str:
    """Return (N,) bool as text, five characters for 32 of them.

    Example:
        >>> unpacked(packed(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return base64.b85encode(np.packbits(hits.numpy()).tobytes()).decode()


def unpacked(text: str, count: int) -> Tensor:
    """Return the `count` bits that `packed` made a text of."""
    values = np.frombuffer(base64.b85decode(text), np.uint8)
    return torch.from_numpy(np.unpackbits(values, count=count).astype(bool))


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context that computes in bfloat16, or does nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
