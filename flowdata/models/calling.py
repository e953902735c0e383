"""Calling a model: with the fields that its forward takes, and inside its wrappers."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

from torch import Tensor, nn


def call_with(model: nn.Module, fields: Mapping[str, Any], **options: Any) -> Any:
    """Return what a model makes of the fields of a batch that its `forward` takes.

    The parameters of `forward` decide which fields those are:

    - parameters with the names of fields get those fields;
    - where there is none, or `labels` alone, but `**kwargs`, every tensor among the fields is
      passed by its name;
    - else the model takes inputs under a name of its own: `input_ids`, or the first field where
      there is no such field, is passed by its place.

    Args:
        model: the model; the signature is that of the model inside a PEFT model.
        fields: a batch, by the names of its fields; at least one.
        options: switches such as `use_cache=False`. A model that doesn't know one isn't given it.

    Raises:
        TypeError: `forward` needs something that the batch lacks.

    Example:
        >>> import torch
        >>> class Sums(nn.Module):
        ...     def forward(self, input_ids, scale=1):
        ...         return scale * input_ids.sum()
        >>> batch = {"input_ids": torch.ones(3), "length": torch.tensor([3])}
        >>> call_with(Sums(), batch, scale=2, use_cache=False)
        tensor(6.)
    """
    parameters = inspect.signature(innermost(model).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    names = [name for name in fields if name in parameters]
    if not names and not takes_any:
        first = fields["input_ids"] if "input_ids" in fields else next(iter(fields.values()))
        return model(first)
    if takes_any and set(names) <= {"labels"}:  # a wrapper that passes all else on
        names = [name for name, value in fields.items() if isinstance(value, Tensor)]
    arguments = {name: fields[name] for name in names}
    _check_complete(parameters, arguments, options)
    switches = {name for name in options if takes_any or name in parameters}
    return model(**arguments, **{name: options[name] for name in switches})


def _check_complete(
    parameters: Mapping[str, inspect.Parameter],
    arguments: Mapping[str, Any],
    options: Mapping[str, Any],
) -> None:
    variadic = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    lacking = [
        name
        for name, parameter in parameters.items()
        if parameter.default is inspect.Parameter.empty and parameter.kind not in variadic
        if name not in arguments and name not in options
    ]
    if lacking:
        raise TypeError(
            f"the model's forward needs {', '.join(map(repr, lacking))}, and the batch has "
            f"{', '.join(map(repr, arguments)) or 'nothing that it takes'}; pass a collate_fn that "
            "makes what is lacking, or loss=callable(model, batch) that calls the model"
        )


def takes_field(model: nn.Module, name: str) -> bool:
    """Return whether a model's `forward` takes a field of this name."""
    parameters = inspect.signature(innermost(model).forward).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return name in parameters or takes_any


def unwrapped(model: Any) -> Any:
    """Return the model inside `torch.compile`, DataParallel and DistributedDataParallel.

    Their `forward` takes anything, and their hooks and graphs are made for training. A PEFT model
    is no such wrapper: it is the user's model.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 2)
        >>> unwrapped(torch.compile(layer)) is layer
        True
    """
    if hasattr(model, "_orig_mod"):
        return unwrapped(model._orig_mod)
    if isinstance(model, nn.parallel.DistributedDataParallel | nn.DataParallel):
        return unwrapped(model.module)
    return model


def innermost(model: Any) -> Any:
    """Return the Hugging Face model inside a PEFT model and inside wrappers, else the model itself.

    The inner model has the signature, the configuration and the named parts that a PEFT model
    hides or passes on under other names, and `torch.compile` and DataParallel hide. It is for
    reading: a call goes to the outer model.
    """
    model = unwrapped(model)
    return unwrapped(model.get_base_model()) if is_peft_model(model) else model


def is_peft_model(model: Any) -> bool:
    """Return whether a model is one of PEFT's wrappers, with its methods."""
    return hasattr(model, "peft_config") and hasattr(model, "get_base_model")


def output_layer_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes a language model's logits, None where the model names none.

    A Hugging Face model names the layer by `get_output_embeddings`.
    """
    return _named_layer(model, "get_output_embeddings")


def input_layer_of(model: nn.Module) -> nn.Module | None:
    """Return the layer that makes vectors of a model's tokens, None where the model names none."""
    return _named_layer(model, "get_input_embeddings")


def _named_layer(model: nn.Module, method: str) -> nn.Module | None:
    """What a Hugging Face model's method returns; one of several towers, as CLIP, has none."""
    inner = innermost(model)
    if not hasattr(inner, method):
        return None
    try:
        layer = getattr(inner, method)()
    except NotImplementedError:
        return None
    return layer if isinstance(layer, nn.Module) else None
