"""Copies between host and device that nothing waits for."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import torch
from torch import Tensor

CPU = torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, any nesting of containers, with its tensors on a device."""
    return map_tensors(batch, partial(_to_device, device=device))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from other memory a copy waits for the device
    return tensor.to(device, non_blocking=True)


def map_floating(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every floating tensor in its tuples, lists and mappings converted."""
    return map_tensors(value, lambda t: convert(t) if t.is_floating_point() else t)


def map_tensors(value: Any, convert: Callable[[Tensor], Tensor]) -> Any:
    """Return `value` with every tensor in its tuples, lists and mappings converted.

    A container in which nothing changes is returned itself.
    """
    if isinstance(value, Tensor):
        return convert(value)
    if isinstance(value, tuple | list):
        items = [map_tensors(item, convert) for item in value]
        if all(new is old for new, old in zip(items, value, strict=True)):
            return value
        return type(value)(*items) if hasattr(value, "_fields") else type(value)(items)
    if isinstance(value, Mapping):
        converted = {key: map_tensors(item, convert) for key, item in value.items()}
        if all(new is value[key] for key, new in converted.items()):
            return value
        rebuild = isinstance(value, dict) and type(value) is not dict
        return type(value)(**converted) if rebuild else converted
    return value
