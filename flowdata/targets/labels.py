"""Labels: which part of a batch they are, and the mark of positions without a target."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

IGNORE_INDEX = -100  # PyTorch's and Hugging Face's mark of a position without a target
UNSIGNED = (torch.uint16, torch.uint32, torch.uint64)  # which no layer or loss of PyTorch takes
LABEL_FIELDS = ("labels", "label", "targets", "target")  # the first that a batch has counts


def split_batch(batch: Any) -> tuple[Any, Tensor | None]:
    """Return a batch's inputs and its targets, None where it has none.

    Args:
        batch: an (inputs, targets) pair, or a mapping with a field `labels`, `label`, `targets`
            or `target`; of anything else all is inputs.
    """
    if isinstance(batch, Mapping):
        name = next((field for field in LABEL_FIELDS if field in batch), None)
        inputs = {key: value for key, value in batch.items() if key != name}
        return inputs, None if name is None else _as_targets(name, batch[name])
    if isinstance(batch, tuple | list) and len(batch) == 2 and isinstance(batch[1], Tensor):
        return batch[0], batch[1]
    return batch, None


def _as_targets(name: str, values: Any) -> Tensor:
    """A batch's targets as a tensor; unsigned numbers as PyTorch's losses take them."""
    try:
        targets = torch.as_tensor(values)
    except (TypeError, ValueError, RuntimeError) as error:
        strange = next((v for v in values if isinstance(v, str) or v is None), values)
        raise ValueError(
            f"{name!r} must be numbers, got {strange!r}: give each class a number from 0 on, "
            f"{IGNORE_INDEX} where nothing counts; without targets leave the field out"
        ) from error
    return targets.long() if targets.dtype in UNSIGNED else targets


def describe_batch(batch: Any) -> str:
    """Return what a batch looks like, for a message.

    Example:
        >>> describe_batch([1, 2, 3])
        'a list of 3'
    """
    if isinstance(batch, Mapping):
        return f"a mapping with {', '.join(map(repr, batch))}"
    if isinstance(batch, tuple | list):
        return f"a {type(batch).__name__} of {len(batch)}"
    return f"a {type(batch).__name__}"


def next_tokens(labels: Tensor, ignore_index: int = IGNORE_INDEX) -> Tensor:
    """Return what each position of a causal model predicts, (B, T): the label one place further.

    Args:
        labels: (B, T) int64, unshifted, as Hugging Face gives them.
        ignore_index: the target of the last position, which predicts nothing.

    Example:
        >>> next_tokens(torch.tensor([[5, 6, 7]]))
        tensor([[   6,    7, -100]])
    """
    return F.pad(labels[:, 1:], (0, 1), value=ignore_index)
