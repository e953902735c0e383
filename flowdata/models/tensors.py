"""Tensors in nested containers: converting all of them, and copying them to a device."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")  # where losses are kept, and where a model is unless it says otherwise


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, any nesting of containers, with its tensors on a device.

    The host doesn't wait for the copies: the device makes them before any work it is given later.
    """
    return map_tensors(batch, partial(_to_device, device=device))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        # A GPU can copy on its own only from memory that the operating system will not move.
        tensor = tensor.pin_memory()
    return tensor.to(device, non_blocking=True)


def map_floating(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every floating tensor in its tuples, lists and mappings converted."""
    return map_tensors(value, lambda t: convert(t) if t.is_floating_point() else t)


def map_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor in its tuples, lists and mappings converted.

    Named tuples and subclasses of dict keep their types, as a model's output and a tokenizer's
    batch must. A container in which nothing changes is returned itself.

    Example:
        >>> map_tensors({"x": [torch.tensor(1)], "name": "a"}, lambda t: t + 1)
        {'x': [tensor(2)], 'name': 'a'}
    """
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, convert) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        is_named_tuple = hasattr(value, "_fields")
        return type(value)(*items) if is_named_tuple else type(value)(items)
    if isinstance(value, Mapping):
        entries = {key: map_tensors(item, convert) for key, item in value.items()}
        if all(new is value[key] for key, new in entries.items()):
            return value
        is_subclass = isinstance(value, dict) and type(value) is not dict
        return type(value)(**entries) if is_subclass else entries
    return value


def cloned(batch: Any) -> Any:
    """Return a copy of a batch, for a forward that may change its inputs."""
    return map_tensors(batch, Tensor.clone)


def tensors_in(value: Any) -> list[Tensor]:
    """Return every tensor in a value's tuples, lists and mappings, in order."""
    tensors: list[Tensor] = []

    def note(tensor: Tensor) -> Tensor:
        tensors.append(tensor)
        return tensor

    map_tensors(value, note)
    return tensors
