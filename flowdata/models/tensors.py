"""Copies between host and device that nothing waits for."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowdata.models.precision import map_tensors

if TYPE_CHECKING:
    from flowdata.targets.predictions import TargetLosses


CPU = torch.device("cpu")


def to_device(batch: Any, device: torch.device) -> Any:
    """Return a batch, any nesting of containers, with its tensors on a device."""
    return map_tensors(batch, partial(_to_device, device=device))


def _to_device(tensor: Tensor, device: torch.device) -> Tensor:
    if device.type == "cuda" and not tensor.is_cuda and not tensor.is_pinned():
        tensor = tensor.pin_memory()  # from other memory a copy waits for the device
    return tensor.to(device, non_blocking=True)


class Fetched:
    """A pack's losses on their way to the host, behind the work that makes them.

    Work that is given to the device after this does not hold them up.
    """

    def __init__(self, losses: TargetLosses) -> None:
        self.event = torch.cuda.Event() if losses.values.is_cuda else None
        self.losses = replace(
            losses,
            values=_to_host(losses.values),
            counts=losses.counts.cpu(),
            further={name: _to_host(values) for name, values in losses.further.items()},
        )
        if self.event is not None:
            self.event.record()

    def columns(self, *, token_losses: bool) -> dict[str, Tensor]:
        """Return what the store keeps of the pack, once it is there."""
        if self.event is not None:
            self.event.synchronize()
        return self.losses.columns(token_losses=token_losses)


def _to_host(values: Tensor) -> Tensor:
    if not values.is_cuda:
        return values.detach()
    there = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return there.copy_(values.detach(), non_blocking=True)
