"""Calling a model: with the fields that its forward takes, and inside its wrappers."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

# What Python says of a call without an argument that the function can't do without.
_MISSING = re.compile(r"forward\(\) missing \d+ required")
_OF_A_LAYOUT = (AttributeError, IndexError, KeyError, RuntimeError, TypeError, ValueError)


def call_with(model: nn.Module, fields: Mapping[str, Any], **options: Any) -> Any:
    """Return what a model makes of the fields of a batch that its `forward` takes.

    The parameters of `forward` decide which fields those are:

    - parameters with the names of fields get those fields;
    - where there is none, or `labels` alone, but `**kwargs`, every tensor among the fields is
      passed by its name;
    - where none has the name of the first one, which the model needs, the model takes inputs under
      a name of its own: `input_ids` are passed by their place, or where there are none the only
      field that can be meant. Beside a field that is larger, one number for each sample, such as
      an index, is none.

    Args:
        model: the model; the signature is that of the model inside a PEFT model.
        fields: a batch, by the names of its fields; at least one.
        options: switches such as `use_cache=False`. A model that doesn't know one isn't given it.

    Raises:
        TypeError: no field, or more than one, can be what `forward` takes.

    Example:
        >>> import torch
        >>> class Sums(nn.Module):
        ...     def forward(self, input_ids, scale=1):
        ...         return scale * input_ids.sum()
        >>> batch = {"input_ids": torch.ones(3), "length": torch.tensor([3])}
        >>> call_with(Sums(), batch, scale=2, use_cache=False)
        tensor(6.)
    """
    parameters = parameters_of(model)
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    names = [name for name in fields if name in parameters]
    by_place = None
    if not takes_any and (not names or _lacks_first(parameters, fields)):
        by_place = _field_by_place(fields, names, list(parameters))
    if takes_any and set(names) <= {"labels"}:  # a wrapper that passes all else on
        names = [name for name, value in fields.items() if isinstance(value, Tensor)]
    arguments = {name: fields[name] for name in names}
    switches = {name for name in options if takes_any or name in parameters}
    first = [] if by_place is None else [fields[by_place]]
    by = "" if by_place is None else f", and {by_place!r} was given by its place"
    given = f"{', '.join(map(repr, fields))}{by}"
    with _explained(model, given, is_guess=by_place is not None), _shown(fields):
        try:
            return model(*first, **arguments, **{name: options[name] for name in switches})
        except TypeError as error:
            if not any(is_unexpected(name, error) for name in switches - parameters.keys()):
                raise
            return model(*first, **arguments)  # what it passes `**kwargs` on to takes no switch


def is_unexpected(name: str, error: TypeError) -> bool:
    """Return whether an error says that some function doesn't take a keyword of this name."""
    return f"unexpected keyword argument {name!r}" in str(error)


def call_in_order(model: nn.Module, inputs: Any) -> Any:
    """Return what a model makes of a batch's inputs: one, or several one after another."""
    arguments = inputs if isinstance(inputs, tuple | list) else [inputs]
    with _explained(model, f"{len(arguments)} without a name"):
        return model(*arguments)


@contextmanager
def _explained(model: nn.Module, given: str, *, is_guess: bool = False) -> Iterator[None]:
    """Say of a call that fails for lack of an argument what `forward` takes and what there was."""
    try:
        yield
    except (TypeError, IndexError, KeyError) as error:
        if not (is_guess or _MISSING.search(str(error))):
            raise
        raise type(error)(
            f"{error} (the model's forward takes {', '.join(map(repr, parameters_of(model)))}; the "
            f"batch has {given}). Name the fields as forward names its arguments, in the samples "
            "or by collate_fn; for a forward that needs its labels pass loss='own', for one of "
            "another kind loss=callable(model, batch)"
        ) from error


@contextmanager
def _shown(fields: Mapping[str, Any]) -> Iterator[None]:
    """Say of a call with images or lists that fails which layout these have.

    Models take images in layouts of their own, and say little of others.
    """
    try:
        yield
    except Exception as error:
        # Errors of other classes, such as that of a full memory, mean something else.
        if type(error) not in _OF_A_LAYOUT or _MISSING.search(str(error)):
            raise
        layouts = {name: _layout(value) for name, value in fields.items()}
        odd = [f"{name!r} {layout}" for name, layout in layouts.items() if layout]
        if not odd:
            raise
        raise type(error)(
            f"{error} (the model's forward was given {', '.join(odd)}). If that is not the layout "
            "that the model takes, pass as collate_fn what makes its batches in training, such as "
            "one that calls its processor"
        ) from error


def _layout(value: Any) -> str:
    """The layout of images, sounds or a list, in words; "" of tokens and of numbers."""
    if isinstance(value, Tensor):
        return f"of shape {tuple(value.shape)}" if value.dim() > 2 else ""
    return f"as a list of {len(value)}" if isinstance(value, list) else ""


def _lacks_first(parameters: Mapping[str, inspect.Parameter], fields: Mapping[str, Any]) -> bool:
    """Whether a `forward` needs a first argument that no field has the name of."""
    first = next(iter(parameters.values()), None)
    return (
        first is not None
        and first.kind in (first.POSITIONAL_ONLY, first.POSITIONAL_OR_KEYWORD)
        and first.default is first.empty
        and first.name not in fields
    )


def _field_by_place(
    fields: Mapping[str, Any], names: list[str], arguments: list[str]
) -> str | None:
    """The field, of those without an argument of their name, that is given by its place."""
    rest = {name: value for name, value in fields.items() if name not in names}
    if not rest:
        return None
    if "input_ids" in rest or len(rest) == 1:
        return "input_ids" if "input_ids" in rest else next(iter(rest))
    tensors = {name: value for name, value in rest.items() if isinstance(value, Tensor)}
    large = [name for name, value in tensors.items() if value.dim() > 1]
    candidates = large or list(tensors) or list(rest)
    if len(candidates) > 1:
        raise TypeError(
            f"the model's forward takes {', '.join(map(repr, arguments))}, and the batch has "
            f"{', '.join(map(repr, fields))}: any of {', '.join(map(repr, candidates))} can be "
            "meant. Name the field as forward names its argument, in the samples or by collate_fn"
        )
    return candidates[0]


def parameters_of(model: nn.Module) -> Mapping[str, inspect.Parameter]:
    """Return the parameters of a model's `forward`, by name."""
    forward = innermost(model).forward
    try:
        return inspect.signature(forward).parameters
    except ValueError:  # compiled by torch.jit, which keeps names alone
        kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
        names = [argument.name for argument in forward.schema.arguments[1:]]
        return {name: inspect.Parameter(name, kind) for name in names}


def takes_field(model: nn.Module, name: str) -> bool:
    """Return whether a model's `forward` takes a field of this name."""
    parameters = parameters_of(model)
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


def without_virtual_tokens(model: nn.Module, values: Tensor, length: int) -> Tensor:
    """Return what a model makes of a batch's own tokens, (B, T, …), of what it makes of more.

    Prompt tuning puts virtual tokens before them.

    Args:
        model: the model, perhaps one of PEFT's.
        values: (B, T, …) or (B, virtual tokens + T, …).
        length: T.
    """
    config = getattr(unwrapped(model), "active_peft_config", None)
    virtual = getattr(config, "num_virtual_tokens", None) or 0
    return values[:, virtual:] if virtual and values.shape[1] == virtual + length else values


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
