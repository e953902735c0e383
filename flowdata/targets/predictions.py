"""Predictions: calling a model that gives one prediction for each target, as a way to its losses.

The losses of given predictions are in prediction_losses.py. Language models have ways of their
own, in flowdata/scoring/language.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import call_with, innermost
from flowdata.models.hooks import last_call
from flowdata.models.tensors import CPU, to_device
from flowdata.targets.labels import describe_batch, split_batch
from flowdata.targets.prediction_losses import binary_cross_entropy, cross_entropy, squared_error
from flowdata.targets.target_losses import TargetLosses, Way


def prediction_way(loss: str, columns: Sequence[str] = (), device: torch.device = CPU) -> Way:
    """Return the way to a loss between a model's predictions and its targets.

    Args:
        loss: one of `PREDICTION_LOSSES`.
        columns: names of further columns, for ``"cross_entropy"`` alone.
        device: where the model takes its inputs.
    """

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, targets = split_batch(batch)
        if targets is None:
            raise ValueError(
                f"loss={loss!r} needs (input, target) pairs or dicts with 'labels', got "
                f"{describe_batch(batch)}; pass loss=callable(model, batch) for another layout"
            )
        layers = _linear_layers(model) if "gradient_norm" in columns else []
        with last_call(layers) as calls:
            predictions = predict(model, to_device(inputs, device)).float()
        if loss == "binary_cross_entropy":
            return binary_cross_entropy(predictions, targets)
        if loss == "mse":
            return squared_error(predictions, targets)
        # The layer that was called last need not have made the logits: look whether it has.
        inputs_of_logits = (
            call.input for call in calls if torch.equal(call.output.float(), predictions)
        )
        hidden = next(inputs_of_logits, None)
        last = classes_come_last(model, inputs, targets)
        return cross_entropy(predictions, targets, columns, hidden, classes_last=last)

    return way


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def classes_come_last(model: nn.Module, inputs: Any, targets: Tensor) -> bool:
    """Return whether logits are (B, T, C) and not (B, C, T), PyTorch's order.

    So they are for (B, T) targets of a model of tokens, or of one of Hugging Face's. The shape of
    the logits alone does not tell where T is C.
    """
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    if isinstance(ids, Tensor) and not ids.is_floating_point() and ids.shape == targets.shape:
        return targets.dim() == 2
    return targets.dim() == 2 and hasattr(innermost(model), "config")


def callable_way(function: Callable[[nn.Module, Any], Tensor], device: torch.device = CPU) -> Way:
    """Return the way to a user's own losses, `function(model, batch)` of shape (B,)."""

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        values = function(model, to_device(batch, device))
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise ValueError(
                "loss=callable must return a tensor of shape (B,), one loss for each sample, got "
                f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}; "
                "use reduction='none'"
            )
        return TargetLosses(values.float(), torch.ones(len(values), dtype=torch.long))

    return way


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
