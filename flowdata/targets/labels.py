"""Labels: which part of a batch they are, and the mark of positions without a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs and targets: a pair, or a mapping with `labels` (or `label`)."""
    if isinstance(batch, Mapping):
        name = next((n for n in ("labels", "label", "targets", "target") if n in batch), None)
        inputs = {key: value for key, value in batch.items() if key != name}
        return inputs, None if name is None else torch.as_tensor(batch[name])
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


def describe_batch(batch: Any) -> str:
    """Return what a batch looks like, for a message."""
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def next_tokens(labels: Tensor, ignore_index: int = -100) -> Tensor:
    """Return labels moved one place left, (B, T): what each position predicts."""
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
