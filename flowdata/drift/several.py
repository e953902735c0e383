"""Several labels: models that say yes or no to each class, and not which class it is.

The predictions of such a model are a distribution over two answers for each of C classes::

    logits (n, C) ──→ (n · C, 2): z for yes, 0 for no        softmax of (z, 0) = sigmoid of z

Divergences are those of an answer, in the mean over a sample's classes.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import say_once
from flowdata.head.kl import Divergences, Predictions, divergences, logits_of
from flowdata.head.kl_logits import kl_of_logits
from flowdata.models.precision import without_autocast
from flowdata.scoring.collate import Collate
from flowdata.targets.labels import split_batch
from flowdata.targets.which_loss import (
    SINGLE_ONES,
    are_probabilities,
    loss_of_batch,
    loss_of_model,
)


def has_several_labels(
    model: nn.Module, labels: Iterable[Tensor | None], classes: int, *, one_each: bool
) -> bool:
    """Return whether a model's outputs are answers to each class, as it or its labels say.

    Args:
        model: its configuration says, if it is one of Hugging Face's.
        labels: of all samples of the probe, (B, C) each, None for labels of another shape. Of other
            models they say it; they are gone through as far as they can.
        classes: outputs of the model.
        one_each: whether each sample has one prediction, so that (B, C) integers are no classes of
            C places.

    Raises:
        ValueError: the outputs are no predictions of classes, but real numbers, or may be.
    """
    loss, teller, remedy = loss_of_model(model), "its configuration says", ""
    if loss is None:
        rows = _joined(labels, classes)
        loss = None if rows is None else _loss_of_labels(rows, one_each=one_each)
        teller = "the probe's labels say"
        remedy = "; if labels say something else, give the probe without them"
    if loss == "mse":
        raise ValueError(
            f"the model predicts real numbers (regression), as {teller}, which are no "
            "distribution over classes, so that it has no KL; drift is for classifiers and "
            f"language models{remedy}"
        )
    return loss == "binary_cross_entropy"


def with_note(collate: Collate, labels: list[Tensor | None]) -> Collate:
    """Return a collation that notes the labels of its batches, as `rows_of_labels` returns them."""

    def collate_with_note(samples: list[Any]) -> Any:
        batch = collate(samples)
        labels.append(rows_of_labels(batch))
        return batch

    return collate_with_note


def rows_of_labels(batch: Any) -> Tensor | None:
    """Return a batch's labels, (B, C); None where a sample has one of them, none, or a map."""
    targets = split_batch(batch)[1]
    return targets if isinstance(targets, Tensor) and targets.dim() == 2 else None


def _joined(labels: Iterable[Tensor | None], classes: int) -> Tensor | None:
    """Labels with one number for each output, (N, C); None for others."""
    parts: list[Tensor] = []
    for part in labels:
        if part is None or part.shape[1] != classes:
            return None
        parts.append(part)
    return torch.cat(parts)


def _loss_of_labels(labels: Tensor, *, one_each: bool) -> str | None:
    """The loss that labels (N, C) of C outputs call for; None for those of one class."""
    if labels.dtype != torch.bool:
        if not labels.is_floating_point():
            if not one_each:
                return None
            labels = labels.float()
        if are_probabilities(labels):
            if ((labels == 0) | (labels == 1)).all():
                say_once(
                    f"the probe has labels {SINGLE_ONES}. Its drift is measured as of one class; "
                    "bools are taken for a yes or no, class numbers (N,) for one class"
                )
            return None
    try:
        return loss_of_batch((None, labels))
    except ValueError as error:
        raise ValueError(
            "the probe's labels can be answers, yes or no to each class, and real numbers, which "
            "are no distribution over classes, so that they have no KL; give answers as 0 and 1"
        ) from error


def divergences_of_answers(base: Predictions, tuned: Predictions) -> Divergences:
    """Return how far apart two predictions of several labels are: means over a sample's classes.

    Args:
        base: of the frozen model, n samples.
        tuned: of the other one.

    Returns:
        (n,) float64 each, nats an answer.
    """
    count = len(base.rows)
    with torch.no_grad(), without_autocast(base.rows.device):
        one, other = (Predictions(_answers(each), nn.Identity()) for each in (base, tuned))
    return Divergences(*(values.view(count, -1).mean(1) for values in divergences(one, other)))


def kl_to_answers(base: Predictions, tuned: Predictions) -> Tensor:
    """Return KL(base ‖ tuned) of each sample, with gradients through `tuned`.

    Args:
        base: of the frozen model, n samples.
        tuned: of the model in training.

    Returns:
        (n,) float32, nats an answer.
    """
    with torch.no_grad():
        reference = _answers(base)
    return kl_of_logits(reference, _answers(tuned)).view(len(base.rows), -1).mean(1)


def _answers(predictions: Predictions) -> Tensor:
    """The logits of yes and no to each class, (n · C, 2) float32."""
    logits = logits_of(predictions).flatten()
    return torch.stack([logits, torch.zeros_like(logits)], 1)
