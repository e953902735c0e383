"""The truth: one sample, collated alone, through the model's own forward."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from benchmarks.sweep.architectures import Kind

IGNORE_INDEX = -100
Collate = Callable[[list[Any]], dict[str, Any]]


def true_losses(
    model: nn.Module, samples: Sequence[Any], collate: Collate, kind: Kind
) -> list[float]:
    """Return each sample's loss alone; what the output names apart is taken off first."""
    return [float(own_loss(model, collate([sample]), kind)) for sample in samples]


def plain_losses(
    model: nn.Module, samples: Sequence[Any], collate: Collate, kind: Kind, dtype: torch.dtype
) -> list[float]:
    """The same with weights and floating inputs in another dtype."""
    low = copy.deepcopy(model).to(dtype)
    for name, buffer in model.named_buffers():
        if "inv_freq" in name:  # these stay in float32, as `from_pretrained` leaves them
            low.get_buffer(name).data = buffer.clone()

    def cast(batch: list[Any]) -> dict[str, Any]:
        return {
            name: value.to(dtype) if _is_floating(value) and name != "labels" else value
            for name, value in collate(batch).items()
        }

    return true_losses(low, samples, cast, kind)


@torch.no_grad()  # what a model keeps from inference mode could not be used outside it
def own_loss(model: nn.Module, batch: dict[str, Any], kind: Kind) -> Tensor:
    """A model's own loss of a batch; where it makes none, the one that its kind stands for.

    Raises:
        ValueError: the model makes no loss, and its kind has none without it.
    """
    output = model(**accepted(model, batch))
    loss = getattr(output, "loss", None)
    if loss is not None:
        return loss.float().mean() - _terms_apart(model, output)
    logits = getattr(output, "logits", None)
    if logits is None or kind.loss is None:
        raise ValueError("the model makes no loss")
    labels = batch["labels"]
    logits = logits.float()
    if kind.name in ("causal_lm", "image_text_to_text"):
        logits, labels = logits[:, :-1], labels[:, 1:]
    return functional.cross_entropy(
        logits.flatten(0, -2), labels.flatten(), ignore_index=IGNORE_INDEX
    )


def accepted(model: nn.Module, batch: dict[str, Any]) -> dict[str, Any]:
    """What a model's forward takes of a batch."""
    parameters = inspect.signature(model.forward).parameters
    if any(parameter.kind is parameter.VAR_KEYWORD for parameter in parameters.values()):
        return batch
    return {name: value for name, value in batch.items() if name in parameters}


def _terms_apart(model: nn.Module, output: Any) -> Tensor:
    """What a mixture of experts adds for its router, where the output holds it apart."""
    config: Any = model.config
    total = torch.zeros(())
    for name in output:
        for end, weight in (("aux_loss", "router_aux_loss_coef"), ("z_loss", "router_z_loss_coef")):
            term = output[name]
            if name.endswith(end) and isinstance(term, Tensor):
                text = config.get_text_config()
                factor = getattr(config, weight, getattr(text, weight, 1.0))
                total = total + factor * term.float()
    return total


def _is_floating(value: Any) -> bool:
    return isinstance(value, Tensor) and value.is_floating_point()
