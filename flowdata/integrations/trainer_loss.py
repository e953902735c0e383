"""The weighted loss of a batch that a Hugging Face Trainer hands over, and its denominator.

Everything here is a function of a batch, its weights and the model's outputs; only
`flowdata.integrations.transformers` knows the Trainer. What kind of loss a run has is decided once,
on its first batch (first_batch.py), and stands in a `RunLoss`.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.losses import Normalize, causal_lm_loss, count_items, weighted_mean
from flowdata.models.adapters import base_model
from flowdata.models.calling import innermost, output_layer_of, takes_field
from flowdata.models.tensors import to_device
from flowdata.targets.labels import IGNORE_INDEX, are_targets, split_batch
from flowdata.targets.meaning import losses_by_name
from flowdata.targets.predictions import logits_of
from flowdata.targets.which_loss import OWN
from flowdata.token_weights import TokenRule

SampleLoss: TypeAlias = Callable[[Any, Any], Tensor]
Unit: TypeAlias = Literal["samples", "labels", "next labels"]


@dataclass(frozen=True)
class RunLoss:
    """What a run is trained on.

    Attributes:
        loss: the name of a loss, or a user's own (outputs, batch) -> (B,).
        factors: of the terms that an output names apart, such as a mixture of experts' `aux_loss`.
            They belong to the batch as a whole and are added to the weighted loss.
        classes_last: logits of ``"cross_entropy"`` are (B, …, C), and not (B, C, …).
        passes_labels: whether the model is called with its labels.
        virtual_tokens: positions that PEFT's prompt tuning puts before the tokens of a sample.
        unit: what a mean of the model's own losses counts, for ``"own"`` alone.
    """

    loss: str | SampleLoss
    factors: Mapping[str, float] = field(default_factory=dict)
    classes_last: bool | None = None
    passes_labels: bool = True
    virtual_tokens: int = 0
    unit: Unit = "samples"


def count_batch(
    run: RunLoss, batch: Mapping[str, Any], weights: Tensor | None, *, normalize: Normalize
) -> Tensor:
    """Return the denominator of one batch: the number of its losses, or the sum of their weights.

    Args:
        run: what the batch is trained on.
        batch: with its labels, but for a user's own loss.
        weights: (B,), or in the shape of labels for each token; None for all ones.
        normalize: ``"count"`` or ``"weights"``.

    Returns:
        0-d.

    Raises:
        ValueError: the batch has no labels, or weights of another shape.
    """
    if not isinstance(run.loss, str) or run.loss == OWN:
        counts = counts_of_samples(run, batch, weights)
    else:
        labels, weights = labels_and_weights(run, batch, weights)
        if run.loss == "causal_lm":
            return count_items(labels, weights, normalize=normalize)
        counts = _targets(run.loss, labels)
        if weights is None or weights.dim() == 1:  # one for each sample
            counts = counts.reshape(len(counts), -1).sum(1)
    if normalize == "weights" and weights is not None:
        counts = counts * to_device(weights, counts.device)
    return counts.sum()


def weighted_loss(
    run: RunLoss,
    outputs: Any,
    batch: Mapping[str, Any],
    weights: Any,
    *,
    normalize: Normalize,
    num_items: Any,
    token_rule: TokenRule | None = None,
    **reference_of_loss: Any,
) -> Tensor:
    """Return Σ weight · loss of a batch over a denominator.

    Args:
        run: what the batch is trained on; for ``"own"`` see sample_by_sample.py.
        outputs: what the model returned for the batch.
        batch: what the model was called with, and its labels.
        weights: (B,), or in the shape of labels for each token; None for all ones of a causal
            language model.
        normalize: ``"count"`` or ``"weights"``.
        num_items: the denominator of the optimiser step, or None for this batch's own.
        token_rule: for causal language models, as in `causal_lm_loss`.
        reference_of_loss: what `reference_options` returned.

    Returns:
        0-d.
    """
    options: Any = {"normalize": normalize, "num_items": num_items}
    if not isinstance(run.loss, str):
        return weighted_mean(_checked(run.loss(outputs, batch), weights), weights, **options)
    labels, weights = labels_and_weights(run, batch, weights)
    logits = logits_of(outputs)
    if run.loss == "causal_lm":
        options |= {"token_rule": token_rule, **reference_of_loss}
        return causal_lm_loss(logits, labels, weights, **options)
    losses = losses_by_name(run.loss, logits.float(), labels, classes_last=run.classes_last)
    if weights.dim() == 1:
        # The losses stand in one row, sample after sample: each sample's weight goes to all of its
        # targets.
        weights = weights.repeat_interleave(to_device(losses.counts, weights.device))
    else:
        weights = to_device(weights, labels.device)[_targets(run.loss, labels).bool()]
    return weighted_mean(losses.values, weights, **options)


def reference_options(
    run: RunLoss, model: nn.Module, fields: Mapping[str, Any], strength: float
) -> dict[str, Any]:
    """Return what `causal_lm_loss` needs for a divergence to a PEFT model's base.

    Args:
        run: what the batch is trained on.
        model: as the Trainer calls it.
        fields: what it is called with.
        strength: of the divergence, > 0.
    """
    with base_model(model):
        logits = logits_of(model(**fields))
    # Virtual tokens are an adapter, so that the base model has no positions for them. They have no
    # target either.
    logits = F.pad(logits, (0, 0, run.virtual_tokens, 0))
    return {"kl_to_reference": strength, "reference": logits}


def counts_of_samples(run: RunLoss, batch: Mapping[str, Any], weights: Tensor | None) -> Tensor:
    """Return how much each sample counts in the mean of a loss with one value for a sample, (B,).

    Args:
        run: its unit says what is counted.
        batch: with labels, if they are counted.
        weights: (B,); None takes the number of samples from the batch.

    Raises:
        ValueError: weights of single tokens.
    """
    if weights is not None and weights.dim() != 1:
        raise ValueError(
            f"this loss has one value for each sample, and weights have shape "
            f"{tuple(weights.shape)}; give each sample one weight, and keep samples apart in the "
            "batch"
        )
    if run.unit == "samples":
        tensors = (value for value in batch.values() if isinstance(value, Tensor))
        place = next(tensors) if weights is None else weights
        return torch.ones(len(place), device=place.device, dtype=torch.float32)
    labels = labels_of(batch)
    labels = labels[:, 1:] if run.unit == "next labels" else labels
    return (labels != IGNORE_INDEX).reshape(len(labels), -1).sum(1).float()


def labels_of(batch: Mapping[str, Any]) -> Tensor:
    """Return the labels of a batch.

    Raises:
        ValueError: it has none.
    """
    labels = split_batch(batch)[1]
    if labels is None:
        raise ValueError(
            f"a batch has no tensor 'labels' (it has {', '.join(map(repr, batch))}), so its "
            "losses can't be told; name the targets 'labels' in the data set or the collator, or "
            "pass loss=(outputs, batch) -> (B,) losses, or loss='own'"
        )
    return labels


def labels_and_weights(
    run: RunLoss, batch: Mapping[str, Any], weights: Tensor | None
) -> tuple[Tensor, Tensor | None]:
    """Return a batch's labels and weights, laid along what the model returns of them.

    Virtual tokens come first and have no label::

        model's positions   v v v t t t t
        labels              · · · l l l l

    Raises:
        ValueError: weights that are neither one for each sample nor one for each label.
    """
    labels = labels_of(batch)
    of_labels = labels.shape[:1] if labels.is_floating_point() else labels.shape
    if weights is not None and weights.shape not in (labels.shape[:1], of_labels):
        raise ValueError(
            f"weights have shape {tuple(weights.shape)} and labels {tuple(labels.shape)}: there "
            "has to be one weight for each sample, or one for each label. A collator that joins "
            "samples has to keep their tokens as they are"
        )
    if run.virtual_tokens and labels.dim() == 2:
        padding = (run.virtual_tokens, 0)
        if weights is not None and weights.dim() == 2:
            weights = F.pad(weights, padding)
        labels = F.pad(labels, padding, value=IGNORE_INDEX)
    return labels, weights


def fields_for(run: RunLoss, batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return what a model is called with in training: a batch with or without its labels."""
    return dict(batch) if run.passes_labels else without_labels(batch)


def without_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """Return a batch without its labels."""
    name = _label_name(batch)
    return {key: value for key, value in batch.items() if key != name}


def takes_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a model's `forward` takes the labels of a batch."""
    name = _label_name(batch)
    return name is not None and takes_field(model, name)


def needs_labels(model: nn.Module, batch: Mapping[str, Any]) -> bool:
    """Return whether a model has to be called with its labels.

    A language model without labels spares itself a large loss that nobody reads. Of Hugging Face's
    own classes it is known that labels make nothing but the loss, unless a decoder's inputs are
    made from them. Any other `forward` is given the labels if it takes them, so that each batch
    tells whether the model's own loss is that of the run (later_batches.py).
    """
    name = _label_name(batch)
    if name is None or not takes_field(model, name):
        return False
    inner = innermost(model)
    parameter = inspect.signature(inner.forward).parameters.get(name)
    is_optional = parameter is not None and parameter.default is not inspect.Parameter.empty
    has_decoder = getattr(getattr(inner, "config", None), "is_encoder_decoder", False)
    is_of_language = output_layer_of(inner) is not None and not has_decoder
    is_known = type(inner).__module__.startswith("transformers.models.") and is_of_language
    return not (is_known and is_optional)


def _label_name(batch: Mapping[str, Any]) -> str | None:
    """The name of a batch's labels, None where it has none."""
    others = split_batch(batch)[0]
    return next((name for name in batch if name not in others), None)


def _targets(loss: str, labels: Tensor) -> Tensor:
    """1 at each label that has a loss, 0 elsewhere: (B, …); (B,) of class probabilities."""
    if loss == "cross_entropy" and labels.is_floating_point():
        return torch.ones_like(labels[:, 0], dtype=torch.float32)  # of the classes together
    if loss == "mse":
        return torch.ones_like(labels, dtype=torch.float32)
    return are_targets(labels).float()


def _checked(losses: Any, weights: Tensor) -> Tensor:
    """A user's losses, refused unless there is one for each weight."""
    if not isinstance(losses, Tensor) or losses.shape != weights.shape:
        shape = tuple(losses.shape) if isinstance(losses, Tensor) else type(losses).__name__
        raise ValueError(
            "loss=callable (outputs, batch) must return one loss for each sample, "
            f"{tuple(weights.shape)}, got {shape}; use reduction='none', and the mean over each "
            "sample's targets"
        )
    return losses
