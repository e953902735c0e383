"""The losses of a batch's targets, whose they are, and their way to the host."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


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


@dataclass(frozen=True)
class TargetLosses:
    """The losses of a batch's targets, and whose they are.

    Attributes:
        values: (n,) float32, sample after sample.
        counts: (B,) int64, targets of each sample.
        further: further columns by name (see columns.py), (n,) float32 each.
    """

    values: Tensor
    counts: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)

    def columns(self, *, token_losses: bool) -> dict[str, Tensor]:
        """Return what the store keeps of the batch; a sample's value is NaN if not finite."""
        counts = self.counts.cpu()
        values = {"loss": self.values, **self.further}
        columns = {name: _means(each.detach().cpu(), counts) for name, each in values.items()}
        columns["count"] = counts
        if token_losses:
            columns["token_loss"] = self.values.detach().cpu().float()
        return columns


def _means(values: Tensor, counts: Tensor) -> Tensor:
    sums = torch.segment_reduce(values.double(), "sum", lengths=counts, initial=0.0)
    means = (sums / counts).float()  # 0 / 0 is NaN: no target, no value
    return torch.where(means.isfinite(), means, torch.nan)


Way = Callable[[nn.Module, Any], TargetLosses]


def joined(parts: list[TargetLosses]) -> TargetLosses:
    """Return the losses of samples that were run apart, one part after another."""
    if len(parts) == 1:
        return parts[0]
    return TargetLosses(
        torch.cat([part.values for part in parts]),
        torch.cat([part.counts for part in parts]),
        {name: torch.cat([part.further[name] for part in parts]) for name in parts[0].further},
    )
