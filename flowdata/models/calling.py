"""Calling a model: with what its forward takes, inside its wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call_with(model: nn.Module, fields: Mapping[str, Any], **options: Any) -> Any:
    """Call a model with those fields that its `forward` takes by name."""
    parameters = inspect.signature(innermost(model).forward).parameters
    names = {name for name in fields if name in parameters}
    if not names and not _takes_any(parameters):
        first = fields["input_ids"] if "input_ids" in fields else next(iter(fields.values()))
        return model(first)
    if not names:
        names = {name for name, value in fields.items() if isinstance(value, Tensor)}
    accepted_options = {
        name: value
        for name, value in options.items()
        if name in parameters or _takes_any(parameters)
    }
    return model(**{name: fields[name] for name in names}, **accepted_options)


def unwrapped(model: Any) -> Any:
    """Return the model inside torch.compile's and DDP's wrappers."""
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel):
        return unwrapped(model.module)
    return model


def innermost(model: Any) -> Any:
    """Return the model inside a PEFT model, else the model itself."""
    if hasattr(model, "peft_config") and hasattr(model, "get_base_model"):
        return model.get_base_model()
    return model


def _takes_any(parameters: Mapping[str, inspect.Parameter]) -> bool:
    return any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())


def output_layer_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes a language model's logits, None where it names none."""
    inner = innermost(model)
    if not hasattr(inner, "get_output_embeddings"):
        return None
    layer = inner.get_output_embeddings()
    return layer if isinstance(layer, nn.Module) else None
