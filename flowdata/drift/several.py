"""Several labels: models that say yes or no to each class, and not which class it is.

The predictions of such a model are a distribution over two answers for each of C classes::

    logits (n, C) ──→ (n · C, 2): z for yes, 0 for no        softmax of (z, 0) = sigmoid of z

Divergences are those of an answer, in the mean over a sample's classes.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowdata.head.kl import Divergences, Predictions, divergences, logits_of
from flowdata.head.kl_logits import kl_of_logits
from flowdata.models.precision import without_autocast
from flowdata.targets.labels import split_batch
from flowdata.targets.which_loss import are_probabilities, loss_of_batch, loss_of_model


def has_several_labels(model: nn.Module, batch: Any, classes: int) -> bool:
    """Return whether a model's outputs are answers to each class, as it or a batch's labels say.

    Args:
        model: its configuration says, if it is one of Hugging Face's.
        batch: of the probe; of other models its labels say it, one for each class of a sample.
        classes: outputs of the model.

    Raises:
        ValueError: the outputs are no predictions of classes, but real numbers, or may be.
    """
    loss = loss_of_model(model) or _loss_of_labels(batch, classes)
    if loss == "mse":
        raise ValueError(
            "the model predicts real numbers (regression), which are no distribution over classes, "
            "so that it has no KL; drift is for classifiers and language models"
        )
    return loss == "binary_cross_entropy"


def _loss_of_labels(batch: Any, classes: int) -> str | None:
    """The loss that labels with one number for each output call for; None for other labels."""
    targets = split_batch(batch)[1]
    if not isinstance(targets, Tensor) or targets.dim() != 2 or targets.shape[1] != classes:
        return None
    if targets.is_floating_point() and are_probabilities(targets):
        return None  # of one class
    try:
        return loss_of_batch(batch)
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
