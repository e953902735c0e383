"""The weights of target positions, and the denominators that are counted from them."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.models.tensors import to_device
from flowdata.targets.labels import IGNORE_INDEX, next_tokens

Normalize: TypeAlias = Literal["count", "weights"]


def target_weights(
    labels: Tensor, weights: Tensor | None = None, *, ignore_index: int = IGNORE_INDEX
) -> Tensor:
    """Return the weight of the target that each position predicts; 0 where it has none.

    Args:
        labels: (B, T) int64, unshifted.
        weights: None for all ones, (B,) per sequence or (B, T) per label.
        ignore_index: the label that marks positions without a target.

    Returns:
        (B, T), float64 for float64 weights and float32 otherwise. Position t has the weight that
        belongs to label t + 1.

    Raises:
        TypeError: `weights` is not a tensor.
        ValueError: `weights` has another shape.

    Example:
        >>> import torch
        >>> labels = torch.tensor([[0, 1, 2], [-100, -100, 3]])
        >>> target_weights(labels, torch.tensor([1.0, 0.5]))
        tensor([[1.0000, 1.0000, 0.0000],
                [0.0000, 0.5000, 0.0000]])
    """
    is_target = next_tokens(labels, ignore_index) != ignore_index
    if weights is None:
        return is_target.to(torch.float32)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    weights = to_device(weights, labels.device)
    weights = weights.to(torch.promote_types(weights.dtype, torch.float32))
    if weights.shape == labels.shape[:1]:
        weights = weights[:, None]
    elif weights.shape == labels.shape:
        # The weights move one place left along with their labels:
        #   label     l0  l1  l2        position   0   1   2
        #   weight    w0  w1  w2        weight    w1  w2   0
        weights = F.pad(weights[:, 1:], (0, 1))
    else:
        raise ValueError(
            f"weights must be (B,) = {tuple(labels.shape[:1])}, one per sequence, or (B, T) = "
            f"{tuple(labels.shape)}, one per label; got {tuple(weights.shape)}"
        )
    return torch.where(is_target, weights, 0.0)


def count_items(
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "count",
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return what `causal_lm_loss` divides by: target tokens, or the sum of their weights.

    Sum it over the batches (and ranks) of one optimiser step to get `num_items`.

    Args:
        labels: (B, T) int64, unshifted.
        weights: None, (B,) or (B, T), as for `causal_lm_loss`.
        normalize: ``"count"`` or ``"weights"``.
        ignore_index: the label that marks positions without a target.

    Returns:
        0-d, int64 for ``"count"`` and floating for ``"weights"``.

    Raises:
        ValueError: `normalize` is neither, or `weights` has another shape.

    Example:
        >>> import torch
        >>> count_items(torch.tensor([[5, 6, 7], [-100, -100, 8]]))
        tensor(3)
    """
    check_normalize(normalize)
    if normalize == "count":
        return (labels[:, 1:] != ignore_index).sum()
    return target_weights(labels, weights, ignore_index=ignore_index).sum()


def check_normalize(normalize: str) -> None:
    """Raise ValueError unless `normalize` names a denominator."""
    if normalize not in ("count", "weights"):
        raise ValueError(
            "normalize must be 'count' (the paper: divide by the number of losses) or 'weights' "
            f"(divide by the sum of the weights), got {normalize!r}"
        )
