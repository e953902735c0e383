"""The losses of a batch's targets, whose they are, and their way to the host.

A *way* takes a model and a batch and gives these losses; language models have several, which
differ in speed alone (flowdata/scoring/language/ways.py).
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn


@dataclass(frozen=True)
class TargetLosses:
    """The losses of a batch's targets, and whose they are.

    Attributes:
        values: (n,) float32, in nats for cross-entropies, sample after sample.
        counts: (B,) int64, targets of each sample.
        further: further columns by name (see columns.py), (n,) float32 each.
        num_classes: classes, or tokens, that the logits tell apart; 0 where the values are no
            cross-entropies in nats, or no logits were there to tell.
    """

    values: Tensor
    counts: Tensor
    further: Mapping[str, Tensor] = field(default_factory=dict)
    num_classes: int = 0

    def columns(self, *, token_losses: bool) -> dict[str, Tensor]:
        """Return what the store keeps of the batch, on the host.

        Args:
            token_losses: keep the losses of the single targets as well, as `token_loss`.

        Returns:
            `loss` and the further columns, (B,) float32: the mean over each sample's targets, NaN
            for a sample without targets or with a mean that is not finite; `count`, (B,) int64.
        """
        counts = self.counts.cpu()
        values = {"loss": self.values, **self.further}
        columns = {name: _means(each.detach().cpu(), counts) for name, each in values.items()}
        columns["count"] = counts
        if token_losses:
            columns["token_loss"] = self.values.detach().cpu().float()
        return columns


Way = Callable[[nn.Module, Any], TargetLosses]  # of a model and a batch on the host


class Fetched:
    """A pack's losses on their way to the host, behind the work that makes them.

    Copies to pinned memory don't wait: the device reaches them after the work that it was given
    before. An event behind the copies, and not the whole device, is what `columns` waits for;
    work that the device is given later does not hold them up.

        device   | pack 1 | copies 1, event | pack 2 | copies 2, event | ...
        host     begins 1, begins 2, waits for event 1, stores 1, begins 3, waits for event 2, ...
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
        """Wait for the losses and return `TargetLosses.columns` of them."""
        if self.event is not None:
            self.event.synchronize()
        return self.losses.columns(token_losses=token_losses)


def joined(parts: list[TargetLosses]) -> TargetLosses:
    """Return the losses of samples that were run apart, one part after another."""
    if len(parts) == 1:
        return parts[0]
    return TargetLosses(
        torch.cat([part.values for part in parts]),
        torch.cat([part.counts for part in parts]),
        {name: torch.cat([part.further[name] for part in parts]) for name in parts[0].further},
        parts[0].num_classes,
    )


def _means(values: Tensor, counts: Tensor) -> Tensor:
    """The mean of each sample's values, added up in float64; NaN where it isn't finite."""
    if not len(counts):
        return torch.empty(0, dtype=torch.float32)
    sums = torch.segment_reduce(values.double(), "sum", lengths=counts, initial=0.0)
    means = (sums / counts).float()  # 0 / 0 is NaN: no target, no value
    return torch.where(means.isfinite(), means, torch.nan)


def _to_host(values: Tensor) -> Tensor:
    """A copy in pinned memory that nothing has waited for yet; what is on the host stays there."""
    if not values.is_cuda:
        return values.detach()
    host = torch.empty(values.shape, dtype=values.dtype, pin_memory=True)
    return host.copy_(values.detach(), non_blocking=True)
