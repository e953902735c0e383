"""Losses of given predictions: cross-entropy, binary cross-entropy and squared error.

Targets are looked at on the host, where they usually are: to select by a mask on a device, the
host would have to wait until the device has counted it.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.errors import OutOfRangeError
from flowdata.models.tensors import to_device
from flowdata.targets.columns import columns_of_logits
from flowdata.targets.labels import IGNORE_INDEX, are_targets
from flowdata.targets.target_losses import TargetLosses

# A model that squeezes all axes of its output gives one sample alone another shape than a batch.
_SQUEEZED = (
    "; if the model squeezes its output, so that one sample alone has no batch axis, name the axis "
    "to squeeze, as in squeeze(-1)"
)


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    columns: Sequence[str] = (),
    hidden: Tensor | None = None,
    *,
    classes_last: bool = False,
) -> TargetLosses:
    """Return the cross-entropies of classes, in nats, and further columns.

    Args:
        logits: (B, C, …) floating; or (B, …, C), with `classes_last` or where only that fits.
        targets: (B, …) int64, −100 where nothing counts, or (B, C) class probabilities. Classes
            of shape (B, 1) are one for each sample, where logits are (B, C).
        columns: names of further columns, see columns.py.
        hidden: (B, …, d), the inputs of the layer that made the logits; for `gradient_norm`.
        classes_last: prefer (B, …, C) where both orders fit.

    Raises:
        ValueError: a single class, shapes that don't fit, or a target that is no class.
    """
    if targets.is_floating_point():
        return _cross_entropy_of_probabilities(logits, targets, columns, hidden)
    targets = targets.long()
    if logits.dim() == 2 and targets.shape == (len(logits), 1):
        targets = targets.squeeze(1)  # nothing else can be meant: a sample has one row of logits
    logits = _classes_second(logits, targets, classes_last=classes_last)
    is_target = targets != IGNORE_INDEX
    strange = targets[is_target & ((targets < 0) | (targets >= logits.shape[1]))]
    if len(strange):
        raise OutOfRangeError(
            f"loss='cross_entropy' needs classes from 0 to {logits.shape[1] - 1}, as the model has "
            f"them, or {IGNORE_INDEX} where nothing counts, got {int(strange[0])}",
            high=logits.shape[1] - 1,
        )
    counts, places = _counts_and_places(is_target)
    targets, places = to_device([targets, places], logits.device)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    further = {}
    if columns:
        rows = logits.movedim(1, -1).flatten(0, -2)[places]
        inputs = None if hidden is None else hidden.reshape(targets.numel(), -1)[places]
        further = columns_of_logits(rows, targets.flatten()[places], columns, inputs)
    return TargetLosses(losses.flatten()[places], counts, further, logits.shape[1])


def _cross_entropy_of_probabilities(
    logits: Tensor, targets: Tensor, columns: Sequence[str], hidden: Tensor | None
) -> TargetLosses:
    """Of (B, C) logits and (B, C) class probabilities: one target for each sample."""
    targets = to_device(targets, logits.device)
    _check_shapes("cross_entropy", logits, targets, logits.shape)
    if logits.dim() != 2:
        raise ValueError(
            "cross_entropy takes class probabilities of shape (B, C), one row a sample, got "
            f"{tuple(targets.shape)}"
        )
    losses = F.cross_entropy(logits, targets.float(), reduction="none")
    further = columns_of_logits(logits, targets.float(), columns, hidden)
    counts = torch.ones(len(losses), dtype=torch.long)
    return TargetLosses(losses, counts, further, logits.shape[1])


def _classes_second(logits: Tensor, targets: Tensor, *, classes_last: bool) -> Tensor:
    """Logits as PyTorch's cross-entropy takes them, (B, C, …), one for each of (B, …) targets."""
    classes_last |= targets.shape != logits.shape[:1] + logits.shape[2:]
    if classes_last and logits.dim() > 1 and logits.shape[:-1] == targets.shape:
        logits = logits.movedim(-1, 1)
    if logits.dim() < 2 or logits.shape[1] == 1:
        hint = _SQUEEZED if logits.dim() == 0 or len(targets) < len(logits) else ""
        raise ValueError(
            f"cross_entropy needs logits of at least two classes, got shape {tuple(logits.shape)}; "
            "for one logit a sample pass loss='binary_cross_entropy', for one number 'mse'"
            f"{hint}"
        )
    _check_shapes("cross_entropy", logits, targets, logits.shape[:1] + logits.shape[2:])
    return logits


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> TargetLosses:
    """Return the losses of yes-or-no targets, in nats.

    Args:
        logits: (B,), (B, 1) or (B, L) floating.
        targets: (B,), (B, 1) or (B, L) in [0, 1]; −100 and NaN are no targets.

    Raises:
        ValueError: shapes that don't fit, or a target outside [0, 1].
    """
    logits = _without_last_one(logits, targets)
    _check_shapes("binary_cross_entropy", logits, targets, logits.shape)
    is_target = are_targets(targets)
    strange = targets[is_target & ((targets < 0) | (targets > 1))]
    if len(strange):
        raise OutOfRangeError(
            "loss='binary_cross_entropy' needs targets between 0 and 1, or −100 where nothing "
            f"counts, got {strange[0].item():g}",
            high=1,
        )
    counts, places = _counts_and_places(is_target)
    answers, places = to_device([targets.flatten()[places].float(), places], logits.device)
    rows = logits.flatten()[places]
    losses = F.binary_cross_entropy_with_logits(rows, answers, reduction="none")
    return TargetLosses(losses, counts, num_classes=2)  # yes or no


def squared_error(predictions: Tensor, targets: Tensor) -> TargetLosses:
    """Return the squared errors of predictions and targets of one shape, (B, …)."""
    predictions = _without_last_one(predictions, targets)
    _check_shapes("mse", predictions, targets, predictions.shape)
    is_wide = torch.float64 in (predictions.dtype, targets.dtype) or _is_large(targets)
    dtype = torch.float64 if is_wide else torch.float32  # a difference may be small beside both
    targets = to_device(targets, predictions.device)
    losses = (predictions.to(dtype) - targets.to(dtype)).square().float()
    each = losses.reshape(len(losses), -1)
    return TargetLosses(each.flatten(), torch.full((len(each),), each.shape[1]))


def _is_large(targets: Tensor) -> bool:
    """Whether targets are integers that float32 doesn't know apart."""
    return targets.dtype == torch.int64 and bool((targets.abs() >= 2**24).any())


def _without_last_one(predictions: Tensor, targets: Tensor) -> Tensor:
    """(B, …, 1) predictions of (B, …) targets as (B, …): most models keep the axis of outputs."""
    is_extra = predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1
    return predictions.squeeze(-1) if is_extra else predictions


def _counts_and_places(is_target: Tensor) -> tuple[Tensor, Tensor]:
    """(B,) targets of each sample, and the places of all of them in the flat (B, …) tensor."""
    return is_target[:, None].flatten(1).sum(1), is_target.flatten().nonzero().flatten()


def _check_shapes(loss: str, logits: Tensor, targets: Tensor, expected: torch.Size) -> None:
    if targets.shape != expected:
        hint = _SQUEEZED if logits.dim() == 0 else _hint(loss, logits, targets)
        raise ValueError(
            f"loss={loss!r}: predictions have shape {tuple(logits.shape)}, so targets must have "
            f"shape {tuple(expected)}, got {tuple(targets.shape)}{hint}"
        )


def _hint(loss: str, logits: Tensor, targets: Tensor) -> str:
    """What may be meant by targets whose shape doesn't fit, as the end of a sentence."""
    is_whole = not targets.is_floating_point() or bool((targets == targets.round()).all())
    is_one_each = targets.shape in (logits.shape[:1], (*logits.shape[:1], 1))
    if loss == "cross_entropy" and targets.shape == logits.shape:
        return "; for a yes or no of each class pass loss='binary_cross_entropy'"
    if logits.dim() == 2 and is_whole and is_one_each:
        squeezed = ".squeeze(1)" if targets.dim() == 2 else ""
        return f"; if they are classes, give them as integers, as by {squeezed}.long()"
    if targets.shape == (*logits.shape, 1):
        return "; give one number a sample, as by .squeeze(-1)"
    return ""
