"""A classifier's right answers, sample by sample, and their share."""

from __future__ import annotations

import base64
import math
from typing import Any, NamedTuple

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata.targets.labels import UNSIGNED

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64, *UNSIGNED)


class Answers(NamedTuple):
    """A classifier's answers to samples.

    Attributes:
        hits: (N,) bool, which are right; an answer whose logits are no numbers is not.
        accuracy: the share of right ones, in %; NaN where any logits are no numbers.
    """

    hits: Tensor
    accuracy: float


@torch.no_grad()
def answers(model: nn.Module, data: Any, dtype: str = "float32", workers: int = 0) -> Answers:
    """Return a classifier's answers; the arguments are those of `hits`.

    Raises:
        ValueError: see `class_numbers`.
    """
    device = next(model.parameters()).device
    loader = DataLoader(data, batch_size=256, num_workers=workers)
    model.eval()
    right, has_answer = [], []
    with autocast(device, dtype):
        for inputs, targets in loader:
            logits = model(inputs.to(device))
            classes = class_numbers(logits, targets)
            # The largest of NaN is NaN: no answer. A class may be ruled out by -inf.
            values, places = logits.max(1)
            has_answer.append(values.isfinite().cpu())
            right.append((places == classes).cpu() & has_answer[-1])
    hits = torch.cat(right)
    is_finite = bool(torch.cat(has_answer).all())
    return Answers(hits, 100 * hits.double().mean().item() if is_finite else math.nan)


def hits(model: nn.Module, data: Any, dtype: str = "float32", workers: int = 0) -> Tensor:
    """Return which answers are right, (N,) bool; one whose logits are no numbers is not.

    Args:
        model: inputs (B, …) → logits (B, C); left in eval mode.
        data: map-style, samples (input, class).
        dtype: as for `fine_tune`.
        workers: as for `fine_tune`.

    Raises:
        ValueError: see `class_numbers`.
    """
    return answers(model, data, dtype, workers).hits


def accuracy(model: nn.Module, data: Any, dtype: str = "float32", workers: int = 0) -> float:
    """Return the share of right answers, in %; the arguments are those of `hits`.

    It is NaN for a model that diverged: one with logits that are no numbers.

    Raises:
        ValueError: see `class_numbers`.
    """
    return answers(model, data, dtype, workers).accuracy


def class_numbers(logits: Any, targets: Any) -> Tensor:
    """Return a batch's classes, (B,) int64 on the device of the logits, which they are checked for.

    Args:
        logits: (B, C).
        targets: (B,) or (B, 1), integers from 0 to C - 1.

    Raises:
        ValueError: logits or targets are of another kind or shape, or a target is no class's.
    """
    if not isinstance(logits, Tensor) or logits.dim() != 2:
        raise ValueError(f"the model must return logits (B, C), got {_look(logits)}")
    count, num_classes = logits.shape
    is_integer = isinstance(targets, Tensor) and targets.dtype in _INTEGERS
    if not is_integer or targets.shape not in ((count,), (count, 1)):
        raise ValueError(
            f"data must have samples (input, class), each class one integer: for {count} samples "
            f"got targets {_look(targets)}; take .argmax() of a one-hot row, and int() of a float"
        )
    classes: Tensor = targets.reshape(count).long()
    strange = classes[(classes < 0) | (classes >= num_classes)]
    if len(strange):
        raise ValueError(
            f"data has a sample of class {strange[0].item()}, and the model {num_classes} logits "
            f"for classes 0 to {num_classes - 1}: number the classes so, and give each a logit"
        )
    return classes.to(logits.device, non_blocking=True)


def _look(value: Any) -> str:
    """What a value is, for messages."""
    if isinstance(value, Tensor):
        return f"{value.dtype} {tuple(value.shape)}"
    return type(value).__name__


def packed(hits: Tensor) -> str:
    """Return (N,) bool as text, five characters for 32 of them.

    Example:
        >>> unpacked(packed(torch.tensor([True, False, True])), 3)
        tensor([ True, False,  True])
    """
    return base64.b85encode(np.packbits(hits.numpy()).tobytes()).decode()


def unpacked(text: str, count: int | None = None) -> Tensor:
    """Return the `count` bits that `packed` made a text of; None fills them up to whole bytes."""
    values = np.frombuffer(base64.b85decode(text), np.uint8)
    return torch.from_numpy(np.unpackbits(values, count=count).astype(bool))


def autocast(device: torch.device, dtype: str) -> torch.autocast:
    """Return a context that computes in bfloat16, or does nothing for float32."""
    return torch.autocast(device.type, torch.bfloat16, enabled=dtype == "bfloat16")
