"""Tasks: what each loss is, for models that give one prediction for each target.

A method takes a model and a batch, on the host, and returns the loss of every single target
(`TargetLosses`); the mean over a sample's targets is the sample's loss. Language models have
methods of their own, in language.py.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.models.calling import call_with, innermost
from flowdata.models.tensors import CPU, to_device
from flowdata.targets.columns import columns_of_logits
from flowdata.targets.labels import IGNORE_INDEX, describe_batch, split_batch
from flowdata.targets.target_losses import TargetLosses, Way


def prediction_way(loss: str, columns: Sequence[str] = (), device: torch.device = CPU) -> Way:
    """Return the method of a loss between a model's predictions and its targets.

    Args:
        loss: one of `PREDICTION_LOSSES`.
        columns: names of further columns, for ``"cross_entropy"`` alone.
        device: where the model takes its inputs.
    """

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, targets = split_batch(batch)
        if targets is None:
            raise ValueError(
                f"loss={loss!r} needs (input, target) pairs or dicts with 'labels', got "
                f"{describe_batch(batch)}; pass loss=callable(model, batch) for another layout"
            )
        with _last_linear(model, wanted="gradient_norm" in columns) as calls:
            predictions = predict(model, to_device(inputs, device))
        if loss == "binary_cross_entropy":
            return binary_cross_entropy(predictions.float(), targets)
        if loss == "mse":
            return squared_error(predictions.float(), targets)
        logits = predictions.float()
        hidden = next((h for h, out in calls if torch.equal(out.float(), logits)), None)
        last = classes_come_last(model, inputs, targets)
        return cross_entropy(logits, targets, columns, hidden, classes_last=last)

    return run


def classes_come_last(model: nn.Module, inputs: Any, targets: Tensor) -> bool:
    """Whether logits of (B, T) targets are (B, T, C): of a model of tokens, or Hugging Face's.

    Their shape alone does not tell where T is C.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == targets.shape:
        return targets.dim() == 2
    return targets.dim() == 2 and hasattr(innermost(model), "config")


def callable_way(function: Callable[[nn.Module, Any], Tensor], device: torch.device = CPU) -> Way:
    """Return the method of a user's own `(model, batch) -> (B,)` losses."""

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        values = function(model, to_device(batch, device))
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise ValueError(
                "loss=callable must return a tensor of shape (B,), one loss for each sample, got "
                f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}; "
                "use reduction='none'"
            )
        return TargetLosses(values.float(), torch.ones(len(values), dtype=torch.long))

    return run


def predict(model: nn.Module, inputs: Any) -> Tensor:
    """Return a model's predictions: its output, or its output's `logits`."""
    if isinstance(inputs, Mapping):
        output = call_with(model, inputs)
    elif isinstance(inputs, tuple | list):
        output = model(*inputs)
    else:
        output = model(inputs)
    return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: itself, its `logits`, or its first tensor."""
    if isinstance(output, Tensor):
        return output
    if isinstance(output, Mapping) and "logits" in output:
        output = output["logits"]
    elif hasattr(output, "logits"):
        output = output.logits
    elif isinstance(output, tuple | list) and output:
        output = output[0]
    if not isinstance(output, Tensor):
        raise ValueError(
            f"the model returned {type(output).__name__}, in which no logits were found; "
            "pass loss=callable(model, batch)"
        )
    return output


def cross_entropy(
    logits: Tensor,
    targets: Tensor,
    columns: Sequence[str] = (),
    hidden: Tensor | None = None,
    *,
    classes_last: bool = False,
) -> TargetLosses:
    """Losses of classes: targets (B, …) int64, −100 ignored, or (B, C) class probabilities.

    Logits are (B, C, …), or (B, …, C) with `classes_last` or where only that fits; `hidden` is
    (B, …, d), what the layer that made them was given. Where targets are on the host, nothing
    waits for the device.
    """
    if targets.is_floating_point():
        targets = to_device(targets, logits.device)
        _check_shapes("cross_entropy", logits, targets, targets.shape)
        losses = F.cross_entropy(logits, targets.float(), reduction="none")
        further = columns_of_logits(logits, targets.float(), columns, hidden)
        return TargetLosses(losses, torch.ones(len(losses), dtype=torch.long), further)
    targets = targets.long()
    if logits.dim() == 1 or logits.shape[1] == 1:
        raise ValueError(
            f"cross_entropy needs logits of at least two classes, got shape {tuple(logits.shape)}; "
            "for one logit a sample pass loss='binary_cross_entropy'"
        )
    classes_last |= targets.shape != logits.shape[:1] + logits.shape[2:]
    if classes_last and logits.shape[:-1] == targets.shape:
        logits = logits.movedim(-1, 1)
    _check_shapes("cross_entropy", logits, targets, logits.shape[:1] + logits.shape[2:])
    kept = targets != IGNORE_INDEX
    strange = targets[kept & ((targets < 0) | (targets >= logits.shape[1]))]
    if len(strange):
        raise ValueError(
            f"loss='cross_entropy' needs classes from 0 to {logits.shape[1] - 1}, as the model has "
            f"them, or {IGNORE_INDEX} where nothing counts, got {int(strange[0])}"
        )
    counts, places = kept[:, None].flatten(1).sum(1), kept.flatten().nonzero().flatten()
    targets, places = to_device([targets, places], logits.device)
    losses = F.cross_entropy(logits, targets, ignore_index=IGNORE_INDEX, reduction="none")
    further = {}
    if columns:
        rows = logits.movedim(1, -1).flatten(0, -2)[places]
        seen = None if hidden is None else hidden.reshape(targets.numel(), -1)[places]
        further = columns_of_logits(rows, targets.flatten()[places], columns, seen)
    return TargetLosses(losses.flatten()[places], counts, further)


def binary_cross_entropy(logits: Tensor, targets: Tensor) -> TargetLosses:
    """Losses of yes-or-no targets: logits and targets (B,), (B, 1) or (B, L).

    Targets lie between 0 and 1; −100 is ignored, and NaN gives no number.
    """
    if logits.dim() == targets.dim() + 1 and logits.shape[-1] == 1:
        logits = logits.squeeze(-1)
    _check_shapes("binary_cross_entropy", logits, targets, logits.shape)
    kept = targets != IGNORE_INDEX
    strange = targets[kept & ((targets < 0) | (targets > 1))]
    if len(strange):
        raise ValueError(
            "loss='binary_cross_entropy' needs targets between 0 and 1, or −100 where nothing "
            f"counts, got {strange[0].item():g}"
        )
    counts, places = kept.reshape(len(kept), -1).sum(1), kept.flatten().nonzero().flatten()
    wanted, places = to_device([targets.flatten()[places].float(), places], logits.device)
    rows = logits.flatten()[places]
    losses = F.binary_cross_entropy_with_logits(rows, wanted, reduction="none")
    return TargetLosses(losses, counts)


def squared_error(predictions: Tensor, targets: Tensor) -> TargetLosses:
    """Squared errors: predictions and targets of one shape, (B, …)."""
    if predictions.dim() == targets.dim() + 1 and predictions.shape[-1] == 1:
        predictions = predictions.squeeze(-1)
    _check_shapes("mse", predictions, targets, predictions.shape)
    losses = (predictions - to_device(targets, predictions.device).float()).square()
    each = losses.reshape(len(losses), -1)
    return TargetLosses(each.flatten(), torch.full((len(each),), each.shape[1]))


@contextmanager
def _last_linear(model: nn.Module, *, wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what the linear layer that is called last is given and gives, where wanted."""
    calls: list[tuple[Tensor, Tensor]] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[:] = [(args[0], output)]

    layers = [module for module in model.modules() if wanted and isinstance(module, nn.Linear)]
    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


def _check_shapes(loss: str, logits: Tensor, targets: Tensor, expected: torch.Size) -> None:
    if targets.shape != expected:
        binary = loss == "cross_entropy" and targets.shape == logits.shape
        hint = "; for a yes or no of each class pass loss='binary_cross_entropy'" if binary else ""
        raise ValueError(
            f"loss={loss!r}: predictions have shape {tuple(logits.shape)}, so targets must have "
            f"shape {tuple(expected)}, got {tuple(targets.shape)}{hint}"
        )
