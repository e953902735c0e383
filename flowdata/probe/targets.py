"""What a probe's targets mean: classes, labels or values, and the loss that belongs to them."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdata._common.notices import say
from flowdata.probe.checks import raise_first
from flowdata.targets.labels import IGNORE_INDEX, UNSIGNED
from flowdata.targets.which_loss import are_probabilities

_NO_TARGET = f"{IGNORE_INDEX} marks a sample without a target: drop these samples"


def fitting_loss(targets: Tensor, outputs: int) -> str:
    """Return the loss that targets and a head of some outputs call for.

    One number for each sample, (N,) or (N, 1), is a class where the head has several outputs;
    with one output it is a label where all are 0 or 1, else a value. Rows of numbers, (N, C), are
    labels where all are 0 or 1, class probabilities where they are floating and sum to 1, else
    values.

    Args:
        targets: (N,) or (N, C), of any dtype.
        outputs: C, of the head.

    Raises:
        ValueError: nothing can tell; the message says what to pass.
    """
    is_floating = targets.is_floating_point()
    is_binary = (targets == 0) | (targets == 1)
    if not is_binary.all() and (is_binary | (targets == IGNORE_INDEX)).all():
        is_bad = ~is_binary.reshape(len(targets), -1).all(1)
        raise_first(is_bad, "targets", _NO_TARGET)
    if targets.dim() == 1 or targets.shape[1] == 1:
        if outputs > 1 and not is_floating:
            return "cross_entropy"
    elif targets.dim() == 2 and targets.dtype != torch.bool and are_probabilities(targets):
        if is_binary.all():
            raise ValueError(
                "loss='auto' found targets with a single 1 in each row: they can be one class for "
                "each sample or a yes or no for each output; pass loss='cross_entropy' or "
                "'binary_cross_entropy'"
            )
        if is_floating:
            return "cross_entropy"
    if is_binary.all():
        return "binary_cross_entropy"
    if not is_floating:
        say(
            f"the probe takes its integer targets, {tuple(targets.shape)}, for values of a "
            f"regression, as the head has {outputs} output{'s' * (outputs > 1)}; give loss= to "
            "choose, or a head with one output for each class"
        )
    return "mse"


def targets_for(loss: str, targets: Tensor, samples: int, outputs: int) -> Tensor:
    """Return targets as a loss takes them: (N,) int64 classes, or (N, C) float64.

    Args:
        loss: the loss's name.
        targets: as the user gave them.
        samples: N, the number of features.
        outputs: C, of the head.

    Raises:
        ValueError: shapes or values don't fit the loss or the head, the first sample is named; or
            all samples have the same class.
    """
    if loss != "cross_entropy":
        values = _values(loss, targets, outputs)
    elif targets.dim() == 2 and targets.shape[1] > 1:
        values = _probabilities(targets, outputs)
    else:
        values = _classes(targets, outputs)
    # Without a second class the best bias is infinite; with probabilities between 0 and 1 it isn't.
    is_sure = not values.is_floating_point() or ((values == 0) | (values == 1)).all()
    if loss != "mse" and is_sure and (values == values[0]).all():
        raise ValueError(
            f"targets of {loss!r} must be of at least two classes, all {samples} are "
            f"{values[0].tolist()}: there is nothing to tell apart; check the data set or its slice"
        )
    return values


def check_targets(targets: Tensor, samples: int) -> Tensor:
    """Return targets as numbers of which torch can do all; raise ValueError unless there are N."""
    if targets.dim() == 0 or samples == 0 or len(targets) != samples:
        count = "a single number" if targets.dim() == 0 else len(targets)
        raise ValueError(f"targets must be as many as features, {samples} > 0; got {count}")
    if targets.dim() > 2 or targets.numel() == 0 or targets.is_complex():
        raise ValueError(
            "targets must be real numbers of shape (N,) or (N, C), got "
            f"{targets.dtype} {tuple(targets.shape)}"
        )
    return targets.long() if targets.dtype in UNSIGNED else targets.detach()


def strata(loss: str, targets: Tensor) -> Tensor:
    """Return the stratum of each sample, (N,) int64: folds hold the same share of each stratum.

    It is the class, or the most probable one; of several labels the rarest; of values there is one.

    Args:
        loss: the loss's name.
        targets: as `targets_for` returns them.
    """
    if loss == "mse":
        return targets.new_zeros(len(targets), dtype=torch.int64)
    if loss == "cross_entropy":
        return targets.argmax(1) if targets.is_floating_point() else targets
    has_label = targets > 0.5
    counts = has_label.sum(0).expand(has_label.shape)
    rarest = torch.where(has_label, counts, len(targets) + 1).argmin(1)
    return torch.where(has_label.any(1), rarest, targets.shape[1])


def _classes(targets: Tensor, outputs: int) -> Tensor:
    """One class for each sample, (N,) int64."""
    if outputs == 1:
        raise ValueError(
            "a head of one output has no classes for loss='cross_entropy': give it one output for "
            "each class, or loss='binary_cross_entropy' for two classes, 'mse' for values"
        )
    is_two_of_many = targets.dtype == torch.bool and outputs > 2
    if targets.is_floating_point() or is_two_of_many:
        raise ValueError(
            "targets of 'cross_entropy' must be integer classes of shape (N,) or (N, 1), or "
            f"probabilities of shape (N, {outputs}); got {targets.dtype} {tuple(targets.shape)} "
            f"for a head of {outputs} outputs; targets.long() are classes"
        )
    classes = targets.reshape(-1).long()
    raise_first(classes == IGNORE_INDEX, "targets", _NO_TARGET, classes)
    is_bad = (classes < 0) | (classes >= outputs)
    raise_first(is_bad, "targets", f"no class of a head with {outputs} outputs", classes)
    return classes


def _probabilities(targets: Tensor, outputs: int) -> Tensor:
    """A distribution over classes for each sample, (N, C) float64, which sums to 1."""
    _check_shape("cross_entropy", targets, outputs)
    values = targets.double()
    sums = values.sum(1, keepdim=True)
    is_bad = (values < 0).any(1) | ((sums[:, 0] - 1).abs() > 1e-2)
    raise_first(is_bad, "targets", "no probabilities of classes: they must be >= 0 with a sum of 1")
    return values / sums


def _values(loss: str, targets: Tensor, outputs: int) -> Tensor:
    """One number for each output of the head, (N, C) float64."""
    if targets.dim() == 1 and outputs == 1:
        targets = targets[:, None]
    _check_shape(loss, targets, outputs)
    values = targets.double()
    if loss == "binary_cross_entropy":
        is_bad = ((values < 0) | (values > 1)).any(1)
        raise_first(is_bad, "targets", "neither 0 nor 1 nor between; give loss='mse' for values")
    return values


def _check_shape(loss: str, targets: Tensor, outputs: int) -> None:
    """Raise ValueError unless there is one finite number for each sample and output."""
    shape = (len(targets), outputs)
    if targets.shape != shape:
        hint = "; classes must be integers: targets.long()" if targets.is_floating_point() else ""
        raise ValueError(
            f"targets of {loss!r} must have shape {shape}, one value for each output of the head; "
            f"got {tuple(targets.shape)}{hint if targets.shape[1:].numel() == 1 else ''}"
        )
    raise_first(~targets.isfinite().all(1), "targets", "not finite: drop these samples")
