"""What a model gives for the first batch: outputs, its own loss, and gradients by the logits."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.rng import preserved_rng
from flowdata.integrations.trainer_loss import needs_labels, takes_labels, without_labels
from flowdata.models.precision import dtype_of
from flowdata.targets.own_loss import (
    Reading,
    agrees,
    named_terms,
    own_loss_of,
    readings,
)
from flowdata.targets.predictions import logits_of

_SPREAD = 0.1  # nats between logits, from which losses of other meanings differ


@dataclass(frozen=True)
class FirstOutputs:
    """A batch's outputs beside the loss that the model made of them.

    Attributes:
        outputs: what the model returned.
        logits: in `outputs`; None where it holds none.
        loss: the model's own loss, or None.
        loss_logits: those that it was made of, if they were returned.
        readings: the values that `loss` can be meant to have; none without a loss.
        passes_labels: whether `outputs` come of a call with labels, and training calls it so too.
        dtype: that the model runs in.
    """

    outputs: Any
    logits: Tensor | None
    loss: Tensor | None
    loss_logits: Tensor | None
    readings: list[Reading]
    passes_labels: bool
    dtype: torch.dtype

    def reading_of(self, value: Tensor) -> Reading | None:
        """Return what the model's own loss means if it is a loss by name; None if it is not.

        Args:
            value: the loss by name, 0-d.
        """
        same = (r for r in self.readings if agrees(r.value, value.item(), self.dtype))
        reading = next(same, None)
        return None if reading is None or self.difference(value, reading.factors) else reading

    def difference(self, value: Tensor, factors: Mapping[str, float]) -> float:
        """Return how far the gradients by the logits are beyond rounding, relative.

        0 where they agree; also where no gradient can be had, see `is_telling`.

        Args:
            value: a loss by name, 0-d.
            factors: of the terms that the model's own loss has besides.
        """
        named = _gradient(value, self.logits)
        own = _gradient(self.loss, self.loss_logits)
        if own is None or named is None or own.shape != named.shape:
            return 0.0
        terms = named_terms(self.outputs, factors)
        if isinstance(terms, Tensor) and (of_terms := _gradient(terms, self.logits)) is not None:
            own = own - of_terms
        scale = torch.maximum(own.abs().max(), named.abs().max()).item()
        error = (own.float() - named.float()).abs().max().item()
        leeway = 1e-4 + 4 * torch.finfo(own.dtype).eps * (own.dtype.itemsize < 4)
        return error / scale if scale and not error <= leeway * scale else 0.0

    def is_telling(self) -> bool:
        """Return whether the comparison with a loss of classes could have failed."""
        if self.logits is None or _gradient(self.loss, self.loss_logits) is not None:
            return True
        return (self.logits.max() - self.logits.min()).item() > _SPREAD


def outputs_of(model: nn.Module, inputs: Mapping[str, Any]) -> FirstOutputs:
    """Return a model's outputs for a batch, as the Trainer would call it.

    Args:
        model: the model in training mode.
        inputs: the batch, with its labels.
    """
    takes = takes_labels(model, inputs)
    outputs = _called(model, inputs if takes else without_labels(inputs))
    logits = _logits_in(outputs)
    first = FirstOutputs(
        outputs,
        logits,
        own_loss_of(outputs, is_labelled=takes),
        logits,
        readings(model, outputs, is_labelled=takes),
        needs_labels(model, inputs),
        dtype_of(model),
    )
    if first.loss is not None and logits is None:
        # A fused loss, such as Liger's, makes no logits where it is given labels.
        return with_bare_logits(first, model, inputs) or first
    return first


def with_bare_logits(
    first: FirstOutputs, model: nn.Module, inputs: Mapping[str, Any]
) -> FirstOutputs | None:
    """Return the outputs of a call without labels beside the loss of the one with labels.

    None where the model takes no labels, or makes no logits without them.
    """
    if not takes_labels(model, inputs):
        return None
    try:
        outputs = _called(model, without_labels(inputs))
    except Exception:  # whatever it is: a `forward` may demand its labels
        return None
    logits = _logits_in(outputs)
    if logits is None:
        return None
    return replace(first, outputs=outputs, logits=logits, passes_labels=False)


def _called(model: nn.Module, fields: Mapping[str, Any]) -> Any:
    """A model's outputs; a second call draws the same dropout."""
    with preserved_rng():
        return model(**fields)


def _gradient(loss: Tensor | None, logits: Tensor | None) -> Tensor | None:
    """The gradient of a loss by logits; None where they are none of its inputs."""
    if loss is None or logits is None or not (loss.requires_grad and logits.requires_grad):
        return None
    return torch.autograd.grad(loss, logits, retain_graph=True, allow_unused=True)[0]


def _logits_in(outputs: Any) -> Tensor | None:
    try:
        return logits_of(outputs)
    except ValueError:
        return None
