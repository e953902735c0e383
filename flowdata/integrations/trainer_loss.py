"""The weighted loss of a batch that a Hugging Face Trainer hands over, and its denominator.

Everything here is a function of a batch, its weights and the model's outputs; only
`flowdata.integrations.transformers` knows the Trainer. `loss` is everywhere the name of a loss
(`flowdata.targets.which_loss`) or a user's own (outputs, labels) -> (B,).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn

from flowdata.losses import Normalize, causal_lm_loss, count_items, weighted_mean
from flowdata.models.calling import innermost
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.targets.prediction_losses import (
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)
from flowdata.targets.predictions import is_of_tokens, logits_of
from flowdata.targets.target_losses import TargetLosses
from flowdata.token_weights import TokenRule

SampleLoss: TypeAlias = Callable[[Any, Any], Tensor]


def count_batch(
    loss: str | SampleLoss,
    batch: Mapping[str, Any],
    weights: Tensor | None,
    *,
    normalize: Normalize,
) -> Tensor:
    """Return the denominator of one batch: the number of its targets, or the sum of their weights.

    Args:
        loss: what the batch is trained on.
        batch: holds `labels`.
        weights: (B,), or (B, T) for causal language models; None for all ones.
        normalize: ``"count"`` or ``"weights"``.

    Returns:
        0-d.

    Raises:
        ValueError: the batch has no tensor `labels`.
    """
    labels = labels_of(batch)
    if loss == "causal_lm":
        return count_items(labels, weights, normalize=normalize)
    counts = _targets_per_sample(loss, labels)
    if normalize == "weights" and weights is not None:
        counts = counts * weights
    return counts.sum()


def weighted_loss(
    loss: str | SampleLoss,
    outputs: Any,
    batch: Mapping[str, Any],
    weights: Any,
    *,
    model: nn.Module,
    normalize: Normalize,
    num_items: Any,
    token_rule: TokenRule | None = None,
) -> Tensor:
    """Return Σ weight · loss of a batch over a denominator.

    Args:
        loss: what the batch is trained on.
        outputs: what the model returned for the batch.
        batch: what the model was called with, and `labels`.
        weights: (B,), or (B, T) for causal language models; None for all ones there.
        model: it says where its logits have their classes.
        normalize: ``"count"`` or ``"weights"``.
        num_items: the denominator of the optimiser step, or None for this batch's own.
        token_rule: for causal language models, as in `causal_lm_loss`.

    Returns:
        0-d.
    """
    options: Any = {"normalize": normalize, "num_items": num_items}
    labels = labels_of(batch)
    if not isinstance(loss, str):
        return weighted_mean(loss(outputs, labels), weights, **options)
    logits = logits_of(outputs)
    if loss == "causal_lm":
        return causal_lm_loss(logits, labels, weights, token_rule=token_rule, **options)
    losses = _target_losses(loss, logits.float(), batch, model)
    # The losses stand in one row, sample after sample: each sample's weight goes to all of its
    # targets.
    target_weights = weights.repeat_interleave(losses.counts.to(weights.device))
    return weighted_mean(losses.values, target_weights, **options)


def router_loss(model: nn.Module, outputs: Any, steps: int) -> Tensor | float:
    """Return a mixture of experts' balancing loss, its share of an optimiser step.

    The model adds it to its own loss, so whoever replaces that loss has to add it again. It is a
    mean over a batch and not a sum over items, therefore it is divided by the number of batches.

    Args:
        model: the model, whose configuration holds the factor.
        outputs: what it returned; without an `aux_loss` the result is 0.
        steps: batches in the optimiser step.
    """
    auxiliary = getattr(outputs, "aux_loss", None)
    if auxiliary is None:
        return 0.0
    config = innermost(model).config.get_text_config()
    share: Tensor = config.router_aux_loss_coef * auxiliary / steps
    return share


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch.

    Raises:
        ValueError: it has no tensor of that name.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise ValueError(
            f"a batch has no tensor 'labels' (it has {', '.join(map(repr, batch))}), so its "
            "items can't be counted; name the targets 'labels' in the data set or the collator"
        )
    return labels


def _targets_per_sample(loss: str | SampleLoss, labels: Tensor) -> Tensor:
    """Return how many losses each sample of a batch has, (B,)."""
    # Floating labels of a cross-entropy are the probabilities of the classes: one loss together.
    if not isinstance(loss, str) or (loss == "cross_entropy" and labels.is_floating_point()):
        return torch.ones(len(labels), device=labels.device)
    if loss == "mse":
        return torch.full((len(labels),), labels[0].numel(), device=labels.device)
    return (labels != IGNORE_INDEX).reshape(len(labels), -1).sum(1)


def _target_losses(
    loss: str, logits: Tensor, batch: Mapping[str, Any], model: nn.Module
) -> TargetLosses:
    """Return the loss of every target of a model whose predictions belong to its labels as such."""
    labels = batch["labels"]
    if loss == "binary_cross_entropy":
        return binary_cross_entropy(logits, labels)
    if loss == "mse":
        return squared_error(logits, labels)
    last = loss != "cross_entropy" or is_of_tokens(model, batch, labels)
    return cross_entropy(logits, labels, classes_last=last)
