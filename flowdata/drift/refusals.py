"""Refusals: arguments that are none of a drift meter's, and models whose drift has no number."""

from __future__ import annotations

import torch
from torch import nn

from flowdata.drift.rows import Rows
from flowdata.head.output_layer import weight_of
from flowdata.targets.which_loss import are_probabilities


def check_model(model: object) -> None:
    """Raise TypeError unless a model is a module."""
    if not isinstance(model, nn.Module):
        raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")


def check_batch_norm(batch_norm: object) -> None:
    """Raise ValueError unless a way to treat BatchNorm is one of those there are."""
    if batch_norm not in ("reference", "own"):
        raise ValueError(f"batch_norm must be 'reference' or 'own', got {batch_norm!r}")


def check_numbers(rows: Rows) -> None:
    """Raise ValueError unless a model makes numbers of every sample."""
    are_numbers = rows.values.isfinite().all(1).cpu()
    if not are_numbers.all():
        row = int((~are_numbers).nonzero()[0])
        sample = int(torch.searchsorted(rows.counts.cumsum(0), row, right=True))
        what = (
            "its output layer is given inf or NaN"
            if weight_of(rows.layer) is not None
            else "it returns inf or NaN; leave out a class that is never meant, instead of −inf"
        )
        raise ValueError(
            f"the model before training gives no numbers for sample {sample} of the probe "
            f"({what}), so that no other can be compared with it"
        )
    weight = weight_of(rows.layer)
    if weight is not None and not weight.isfinite().all():
        raise ValueError(
            "the output layer of the model before training holds inf or NaN, so that no other can "
            "be compared with it"
        )


def check_logits(rows: Rows, classes: int) -> None:
    """Raise ValueError unless a model's outputs can be logits of two classes or more."""
    if classes < 2:
        raise ValueError(
            "the model has one output, which is no distribution over classes, so that it has no "
            "KL; drift is for classifiers and language models. One that says yes or no by one "
            "logit can be put into a module that returns both, torch.cat([torch.zeros_like(z), z], "
            "1)"
        )
    outputs = rows.values.float()
    is_given = weight_of(rows.layer) is None  # by the model itself, and by no linear layer
    are_shares = bool(((outputs >= 0) & (outputs <= 1)).all() and outputs.any())
    if is_given and (are_shares or are_probabilities(outputs)):
        raise ValueError(
            "the model returns probabilities, all from 0 to 1, where logits are needed; put it "
            "into a module that returns what it has before its softmax or sigmoid, or the "
            "logarithm of what softmax gives"
        )
