"""Checks of a probe's head, features and targets."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn


def check_head(head: nn.Linear) -> None:
    """Raise TypeError unless `head` is a linear layer."""
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")


def check_strength(strength: Any, folds: int, samples: int) -> None:
    """Raise ValueError unless the strength is usable, and the folds where they are needed."""
    if strength == "held_out":
        if not isinstance(folds, int) or not 2 <= folds <= samples:
            raise ValueError(
                "folds must be an integer between 2 and the number of samples, "
                f"{samples}; got {folds}"
            )
    elif isinstance(strength, str) or not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be 'held_out' or a float >= 0, got {strength!r}")


def check_features(features: Tensor, width: int) -> None:
    """Raise ValueError unless the features are floating, finite and (N, `width`)."""
    if features.dim() != 2 or not features.is_floating_point() or features.shape[1] != width:
        raise ValueError(
            f"features must be floating and of shape (N, {width}), the head's in_features; got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    _raise_first(~features.isfinite().all(1), "features", "not finite: check model and inputs")


def fitting_loss(targets: Tensor) -> str:
    """Return the loss that targets look like: integers (N,) are classes, zeros and ones labels."""
    if targets.is_floating_point():
        return "binary_cross_entropy" if ((targets == 0) | (targets == 1)).all() else "mse"
    is_classes = targets.dim() == 1 and targets.dtype != torch.bool
    return "cross_entropy" if is_classes else "binary_cross_entropy"


def targets_for(loss: str, targets: Tensor, samples: int, outputs: int) -> Tensor:
    """Return targets as a loss takes them: (N,) int64 classes, or (N, C) float64.

    Args:
        loss: the loss's name.
        targets: as the user gave them.
        samples: N, the number of features.
        outputs: C, of the head.

    Raises:
        ValueError: shapes or values don't fit the loss or the head; the first sample is named.
    """
    if samples == 0 or len(targets) != samples:
        raise ValueError(f"targets must be as many as features, {samples} > 0; got {len(targets)}")
    return (
        _classes(targets, outputs) if loss == "cross_entropy" else _values(loss, targets, outputs)
    )


def _classes(targets: Tensor, outputs: int) -> Tensor:
    if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
        raise ValueError(
            "targets of 'cross_entropy' must be integer classes of shape (N,); got "
            f"{targets.dtype} {tuple(targets.shape)}"
        )
    is_bad = (targets < 0) | (targets >= outputs)
    _raise_first(is_bad, "targets", f"no class of a head with {outputs} outputs", targets)
    return targets.long()


def _values(loss: str, targets: Tensor, outputs: int) -> Tensor:
    samples = len(targets)
    if targets.shape == (samples,) and outputs == 1:
        targets = targets[:, None]
    if targets.shape != (samples, outputs):
        raise ValueError(
            f"targets of {loss!r} must have shape {(samples, outputs)}, one value for each "
            f"output of the head; got {tuple(targets.shape)}"
        )
    _raise_first(~targets.isfinite().all(1), "targets", "not finite: drop these samples")
    if loss == "binary_cross_entropy":
        is_bad = ((targets != 0) & (targets != 1)).any(1)
        _raise_first(is_bad, "targets", "neither 0 nor 1; give loss='mse' for a regression")
    return targets.double()


def _raise_first(is_bad: Tensor, name: str, problem: str, values: Tensor | None = None) -> None:
    """Raise ValueError with the first bad sample and how many there are."""
    if is_bad.any():
        first = int(is_bad.int().argmax())
        value = "" if values is None else f" is {values[first].item()}:"
        raise ValueError(
            f"{name}[{first}]{value} {problem} ({int(is_bad.sum())} of {len(is_bad)} samples)"
        )
