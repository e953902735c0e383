"""The model's own loss, one sample at a time: ``loss="own"`` of a Trainer on the weights.

A batch costs as many forwards as it has samples. What a mean of their losses counts is told by the
first batch, whose own loss has to be that mean.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.integrations.trainer_loss import RunLoss, Unit, counts_of_samples
from flowdata.losses import Normalize, weighted_mean
from flowdata.models.batch_norm import batch_norm_layers
from flowdata.models.evaluation import in_evaluation
from flowdata.models.tensors import to_device
from flowdata.targets.labels import describe_batch, split_batch
from flowdata.targets.own_loss import agrees, own_loss_of
from flowdata.targets.which_loss import LANGUAGE_LOSSES, OWN, loss_of_model


def own_run(model: nn.Module, inputs: Mapping[str, Any], size: int) -> RunLoss:
    """Return what a mean of the model's own losses of single samples counts to be the batch's.

    Args:
        model: the model, which comes back in training mode.
        inputs: a batch, with its labels.
        size: samples in the batch.

    Raises:
        ValueError: the model makes no loss, or the batch's is no mean over samples.
    """
    if size > 1 and any(layer.training for layer in batch_norm_layers(model).values()):
        raise ValueError(
            "loss='own' runs samples one at a time, and the model has BatchNorm layers in training "
            "mode, which take their statistics from the batch; pass loss=(outputs, batch) -> (B,) "
            "losses instead"
        )
    with torch.no_grad(), in_evaluation(model):  # else dropout would make each call differ
        whole = own_loss_of(model(**inputs))
        if whole is None:
            raise ValueError(
                "loss='own' takes the loss that the model makes itself, and it made none of "
                f"{describe_batch(inputs)}; its forward has to take the labels and return `loss`"
            )
        losses = own_sample_losses(model, inputs, size).double().cpu()
    for unit in _units(model, inputs):
        ones = torch.ones(size, dtype=torch.float32)
        counts = counts_of_samples(RunLoss(OWN, unit=unit), inputs, ones).double().cpu()
        mean = float((torch.where(counts > 0, losses, 0.0) * counts).sum() / counts.sum())
        if agrees(float(whole), mean, whole.dtype):
            return RunLoss(OWN, unit=unit)
    raise ValueError(
        f"loss='own': the model's own loss of the first batch is {float(whole):.6g}, and the mean "
        f"of its losses of single samples {losses.mean().item():.6g}: the batch's loss is no mean "
        "over samples (a sum, a mean weighted by class, …), so weights have no place in it; pass "
        "loss=(outputs, batch) -> (B,) losses"
    )


def tells_unit(inputs: Mapping[str, Any], size: int) -> bool:
    """Return whether a batch tells what a mean counts: samples, or labels, of unequal numbers."""
    labels = split_batch(inputs)[1]
    if labels is None or labels.dim() < 2:
        return True  # samples, whatever the batch
    ones = torch.ones(size, dtype=torch.float32)
    counts = counts_of_samples(RunLoss(OWN, unit="labels"), inputs, ones)
    return bool((counts != counts[0]).any())


def _units(model: nn.Module, inputs: Mapping[str, Any]) -> tuple[Unit, ...]:
    """What a mean may count, that first which the model's class is known for.

    In a batch of one sample, or of samples with equally many labels, all of them agree.
    """
    labels = split_batch(inputs)[1]
    if labels is None or labels.dim() < 2:
        return ("samples",)
    by_class = loss_of_model(model)
    if by_class == "causal_lm":
        return ("next labels", "labels", "samples")
    if by_class in (*LANGUAGE_LOSSES, "cross_entropy"):
        return ("labels", "next labels", "samples")
    return ("samples", "labels", "next labels")


def weighted_own_loss(
    run: RunLoss,
    model: nn.Module,
    inputs: Mapping[str, Any],
    weights: Tensor,
    *,
    normalize: Normalize,
    num_items: Any,
) -> Tensor:
    """Return Σ weight · loss over a denominator of the model's own losses of single samples.

    Args:
        run: says what a mean counts.
        model: the model, called once for each sample.
        inputs: B samples, collated.
        weights: (B,).
        normalize: ``"count"`` or ``"weights"``.
        num_items: the denominator of the optimiser step, or None for this batch's own.
    """
    losses = own_sample_losses(model, inputs, len(weights))
    counts = counts_of_samples(run, inputs, weights)
    if num_items is None:
        num_items = (counts * to_device(weights, counts.device)).sum()
        num_items = num_items if normalize == "weights" else counts.sum()
    # A sample without a target has no loss: its count of 0 leaves it out.
    weights = to_device(weights * counts.to(weights), losses.device)
    return weighted_mean(losses, weights, num_items=num_items)


def own_sample_losses(model: nn.Module, inputs: Mapping[str, Any], size: int) -> Tensor:
    """Return the loss that a model makes of each sample by itself, (B,).

    Raises:
        ValueError: the batch can't be cut into samples, or the model makes no loss.
    """
    losses = []
    for row in range(size):
        loss = own_loss_of(model(**_row(inputs, row, size)))
        if loss is None:
            raise ValueError("loss='own' takes the loss that the model makes, and it made none")
        losses.append(loss.reshape(()))
    return torch.stack(losses)


def _row(inputs: Mapping[str, Any], row: int, size: int) -> dict[str, Any]:
    """One sample of a batch, with its padding."""
    for name, value in inputs.items():
        if isinstance(value, Tensor) and value.shape[:1] != (size,):
            raise ValueError(
                f"loss='own' runs samples one at a time, and {name!r} of shape "
                f"{tuple(value.shape)} can't be cut into {size}; pass loss=(outputs, batch) -> "
                "(B,) losses instead"
            )
    return {
        name: value[row : row + 1] if isinstance(value, Tensor) else value
        for name, value in inputs.items()
    }
