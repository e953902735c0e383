"""Checks of a probe's head, features and options."""

from __future__ import annotations

import sys
from typing import Any

from torch import Tensor, nn

from flowdata._common.real_numbers import real_number
from flowdata._common.resumable import is_integer


def check_head(head: nn.Linear) -> None:
    """Raise unless a head is a linear layer whose values can be replaced.

    Raises:
        TypeError: `head` is no `nn.Linear`, or one that does not compute x Wᵀ + b with a floating
            W of its own.
        ValueError: `head` has no values yet, no inputs or no outputs.
    """
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")
    if nn.parameter.is_lazy(head.weight) or head.weight.is_meta:
        raise ValueError(
            "head has no values yet (a lazy layer, or one on the device 'meta'): make it with its "
            "sizes, nn.Linear(in_features, out_features)"
        )
    # Weight normalisation and pruning compute the weight anew for each pass: what is written into
    # it would be lost. A quantised layer keeps codes there, and another forward reads it otherwise.
    if (
        "weight" not in dict(head.named_parameters(recurse=False))
        or not head.weight.is_floating_point()
        or type(head).forward is not nn.Linear.forward
    ):
        raise TypeError(
            "head must be a plain nn.Linear with a floating weight of its own, got "
            f"{type(head).__name__} whose weight is parametrised, quantised or used by another "
            "forward; fit an nn.Linear and wrap it afterwards"
        )
    if min(head.weight.shape) == 0:
        raise ValueError(f"head must have inputs and outputs, got {tuple(head.weight.shape[::-1])}")


def check_strength(strength: Any, folds: Any) -> None:
    """Raise ValueError unless strength and folds are usable."""
    if not is_integer(folds) or folds < 2:
        raise ValueError(f"folds must be an integer of at least 2, got {folds!r}")
    if not (isinstance(strength, str) and strength == "held_out"):
        real_number(strength, "strength must be 'held_out' or a float >= 0", 0, sys.float_info.max)


def check_features(features: Tensor, width: int) -> None:
    """Raise ValueError unless the features are floating, finite and (N, `width`)."""
    if features.dim() != 2 or not features.is_floating_point() or features.shape[1] != width:
        raise ValueError(
            f"features must be floating and of shape (N, {width}), the head's in_features; got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    raise_first(~features.isfinite().all(1), "features", "not finite: check model and inputs")


def raise_first(is_bad: Tensor, name: str, problem: str, values: Tensor | None = None) -> None:
    """Raise ValueError with the first bad sample and how many there are.

    Args:
        is_bad: (N,) bool.
        name: the argument's name.
        problem: what is wrong, and what to do.
        values: (N,), of which the first bad one is shown.
    """
    if is_bad.any():
        first = int(is_bad.int().argmax())
        value = "" if values is None else f" is {values[first].item()}:"
        raise ValueError(
            f"{name}[{first}]{value} {problem} ({int(is_bad.sum())} of {len(is_bad)} samples)"
        )
