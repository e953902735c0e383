"""Predictions: calling a model that gives one prediction for each target, as a way to its losses.

The losses of given predictions are in prediction_losses.py. Language models have ways of their
own, in flowdata/scoring/language.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import fields, is_dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import call_in_order, call_with
from flowdata.models.hooks import last_call
from flowdata.models.tensors import CPU, cloned, to_device
from flowdata.targets.labels import describe_batch, split_batch, strings_for_targets
from flowdata.targets.prediction_losses import binary_cross_entropy, cross_entropy, squared_error
from flowdata.targets.target_losses import TargetLosses, Way
from flowdata.targets.which_loss import first_argument, is_hugging_face

# How names end under which outputs hold no logits: losses, and what a model without a head returns.
_NO_LOGITS = ("loss", "losses", "hidden_state", "hidden_states", "pooler_output")


def prediction_way(
    loss: str,
    columns: Sequence[str] = (),
    device: torch.device = CPU,
    *,
    classes_last: bool = False,
) -> Way:
    """Return the way to a loss between a model's predictions and its targets.

    Args:
        loss: one of `PREDICTION_LOSSES`.
        columns: names of further columns, for ``"cross_entropy"`` alone.
        device: where the model takes its inputs.
        classes_last: logits are (B, …, C) where both orders fit, and not (B, C, …).
    """

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, targets = split_batch(batch)
        if targets is None:
            if strings := strings_for_targets(batch):
                raise ValueError(f"loss={loss!r}: {strings}")
            raise ValueError(
                f"loss={loss!r} needs (input, target) pairs or dicts with 'labels', got "
                f"{describe_batch(batch)}; pass loss=callable(model, batch) for another layout"
            )
        layers = _linear_layers(model) if "gradient_norm" in columns else []
        with last_call(layers) as calls:
            predictions = predict(model, to_device(inputs, device))
        if loss == "mse":
            return squared_error(predictions, targets)
        predictions = predictions.float()
        if loss == "binary_cross_entropy":
            return binary_cross_entropy(predictions, targets)
        # The layer that was called last need not have made the logits: look whether it has.
        inputs_of_logits = (
            call.input for call in calls if torch.equal(call.output.float(), predictions)
        )
        hidden = next(inputs_of_logits, None)
        return cross_entropy(predictions, targets, columns, hidden, classes_last=classes_last)

    return way


def _linear_layers(model: nn.Module) -> list[nn.Module]:
    return [module for module in model.modules() if isinstance(module, nn.Linear)]


def classes_come_last(model: nn.Module, batches: Iterable[Any], device: torch.device) -> bool:
    """Return whether logits are (B, T, C) and not (B, C, T), PyTorch's order.

    The shapes tell, unless there are as many classes as places in every batch. Then it is known of
    Hugging Face's models: classes come last.

    Args:
        model: the model.
        batches: with targets; they are looked at until the shapes of one tell.
        device: where the model takes its inputs.

    Raises:
        ValueError: nothing tells.
    """
    shape, is_known = None, False
    for batch in batches:
        inputs, targets = split_batch(batch)
        if targets is None or targets.dim() < 2 or targets.is_floating_point():
            return False
        if shape is not None and targets.shape[1:] == shape[2:]:
            continue  # as many places as before tell no more
        logits = predict(model, to_device(cloned(inputs), device))
        is_second = targets.shape == logits.shape[:1] + logits.shape[2:]
        is_last = targets.shape == logits.shape[:-1]
        if not (is_second and is_last):
            return is_last
        shape, is_known = tuple(logits.shape), are_known_last(model, targets)
    if shape is None or is_known:
        return is_known
    raise ValueError(
        f"loss='cross_entropy': the model returns logits of shape {shape} for as many classes as "
        "places, so that either axis could be the classes'; pass loss=callable(model, batch)"
    )


def are_known_last(model: nn.Module, targets: Tensor) -> bool:
    """Return whether a model is known to give (B, T, C) logits of (B, T) targets.

    Hugging Face's models do. One of the user's own may give PyTorch's (B, C, T).
    """
    return targets.dim() == 2 and is_hugging_face(model)


def own_way(loss_of: Callable[[nn.Module, Any], float | None], device: torch.device = CPU) -> Way:
    """Return the way to the loss that a model makes itself, of one sample collated alone.

    Args:
        loss_of: (model, batch) -> the model's own loss, None where it makes none.
        device: where the model takes its inputs.
    """

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        loss = loss_of(model, to_device(batch, device))
        if loss is None:
            raise ValueError(
                "loss='own' takes the loss that the model makes itself, and it made none of "
                f"{describe_batch(batch)}; its forward has to take the labels and return `loss`"
            )
        return TargetLosses(torch.tensor([loss]), torch.ones(1, dtype=torch.long))

    return way


def callable_way(
    function: Callable[[Any, Any], Tensor],
    call: Callable[[nn.Module, Any], Any],
    device: torch.device = CPU,
) -> Way:
    """Return the way to a user's own losses, of shape (B,).

    Args:
        function: (model, batch) -> losses; or (outputs, batch) -> losses, by that name of its first
            argument, as a Trainer takes it.
        call: (model, batch) -> the model's output for a batch with its labels.
        device: where the model takes its inputs.
    """

    takes_outputs = first_argument(function) in ("outputs", "output")

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        batch = to_device(batch, device)
        values = function(call(model, batch) if takes_outputs else model, batch)
        if not isinstance(values, Tensor) or values.dim() != 1:
            raise ValueError(
                "loss=callable must return a tensor of shape (B,), one loss for each sample, got "
                f"{tuple(values.shape) if isinstance(values, Tensor) else type(values).__name__}; "
                "use reduction='none'"
            )
        return TargetLosses(values.float(), torch.ones(len(values), dtype=torch.long))

    return way


def predict(model: nn.Module, inputs: Any) -> Tensor:
    """Return a model's predictions: the logits in its output (`logits_of`)."""
    if isinstance(inputs, Mapping):
        output = call_with(model, inputs)
    else:
        output = call_in_order(model, inputs)
    return logits_of(output)


def logits_of(output: Any) -> Tensor:
    """Return the logits of a model's output: itself, its `logits`, or the one tensor they can be.

    Args:
        output: a tensor; or a mapping, a tuple, a list or a dataclass of several things.

    Raises:
        ValueError: there is no such tensor, or more than one.

    Example:
        >>> logits_of({"scores": torch.zeros(2, 3), "loss": torch.zeros(2)}).shape
        torch.Size([2, 3])
    """
    if isinstance(output, Tensor):
        return output
    parts = _parts_of(output)
    logits = parts.get("logits", getattr(output, "logits", None))
    if isinstance(logits, Tensor):
        return logits
    if logits is not None:
        raise ValueError(
            f"the model returned {type(logits).__name__} under the name `logits`, and a tensor is "
            "needed there; pass loss=callable(model, batch)"
        )
    tensors = {
        name: each
        for name, each in parts.items()
        if isinstance(each, Tensor)
        and each.is_floating_point()
        and each.dim() > 0
        and not name.endswith(_NO_LOGITS)
    }
    if len(tensors) == 1:
        return next(iter(tensors.values()))
    if tensors:
        raise ValueError(
            f"the model returned {len(tensors)} tensors, "
            f"{', '.join(f'{name} of shape {tuple(t.shape)}' for name, t in tensors.items())}, and "
            "does not say which are its logits; return them under the name `logits`, or pass "
            "loss=callable"
        )
    names = f" of {', '.join(parts)}" if parts else ""
    raise ValueError(
        f"the model returned {type(output).__name__}{names}, in which no logits were found; "
        "pass loss=callable(model, batch)"
    )


def _parts_of(output: Any) -> dict[str, Any]:
    """What an output holds, by name, or by place in a tuple."""
    if isinstance(output, Mapping):
        return {str(name): each for name, each in output.items()}
    if is_dataclass(output):
        return {field.name: getattr(output, field.name) for field in fields(output)}
    if isinstance(output, tuple | list):
        names = getattr(output, "_fields", [f"item {place}" for place in range(len(output))])
        return dict(zip(names, output, strict=True))
    return {}
