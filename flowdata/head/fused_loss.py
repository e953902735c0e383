"""Head and weighted cross-entropy in one: loss and gradients without the logits.

Rows of hidden states go through the head a tile at a time. A tile's logits give its part of the
loss and of the gradients before the next tile overwrites them (gradients.py). One pass is enough
because the coefficients are known in the forward pass: the gradients of Σ coefficient · loss are
complete up to the one factor that autograd hands in later::

    forward     hidden, weight ──→ logits of a tile ──→ losses, and gradients kept in `ctx`
    backward    factor · gradients

The work is therefore that of the plain head: three matrix products.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdata.head.gradients import losses_and_gradients, rows_of_a_tile
from flowdata.head.kl import Predictions
from flowdata.head.kl_loss import kl_to, kl_to_called
from flowdata.head.largest import largest_logits
from flowdata.head.output_layer import Head, OutputModule
from flowdata.head.tiled import target_values


def weighted_head_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    coefficients: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return Σ coefficient · cross-entropy(head(hidden), target) over rows.

    Args:
        hidden: (n, d) floating.
        head: d → V; a plain `nn.Linear` is fused, any other module is called tile by tile, and
            once more in the backward pass.
        targets: (n,) int64 in [0, V).
        coefficients: (n,) floating.
        softcap: logits become softcap · tanh(logits / softcap), after the scale.
        logit_scale: factor on the logits.

    Returns:
        0-d, float64 for float64 hidden states and float32 otherwise.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> head, hidden = nn.Linear(8, 50), torch.randn(3, 8, requires_grad=True)
        >>> targets, weights = torch.tensor([4, 0, 49]), torch.tensor([1.0, 0.5, 0.0])
        >>> loss = weighted_head_loss(hidden, head, targets, weights)
        >>> full = (F.cross_entropy(head(hidden), targets, reduction="none") * weights).sum()
        >>> torch.allclose(loss, full)
        True
    """
    if not _is_plain(head):
        return _called_loss(hidden, head, targets, coefficients, softcap, logit_scale)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))  # as autocast does for `nn.Linear`
    with torch.autocast(device, enabled=False):  # the float32 sums must stay float32
        total: Tensor = _FusedLoss.apply(  # type: ignore[no-untyped-call]
            hidden, head.weight, head.bias, targets, coefficients, softcap, logit_scale
        )
    return total


def head_losses(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return the (n,) float32 losses of rows, without gradients and without the logits.

    Args:
        hidden: (n, d) floating.
        head: d → V; a plain `nn.Linear` is read, any other module is called tile by tile.
        targets: (n,) int64 in [0, V).
        softcap: logits become softcap · tanh(logits / softcap), after the scale.
        logit_scale: factor on the logits.
    """
    with torch.no_grad():
        if _is_plain(head):
            layer = _read(head, hidden.dtype, softcap, logit_scale)
            return target_values(hidden.detach(), layer, targets)[0]
        tiles = _tiles(head, hidden, targets)
        parts = [_called_losses(h, head, t, softcap, logit_scale).float() for h, t in tiles]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


def head_largest_logits(
    hidden: Tensor,
    head: nn.Module,
    count: int,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return the largest logits of rows, (n, min(count, V)) float32, in no order, no gradients.

    Args:
        hidden: (n, d) floating.
        head: as for `head_losses`, and so are softcap and logit_scale.
        count: how many logits of a row.
    """
    with torch.no_grad():
        if _is_plain(head):
            layer = _read(head, hidden.dtype, softcap, logit_scale)
            return largest_logits(hidden.detach(), layer, count)
        parts = []
        for (tile,) in _tiles(head, hidden):
            logits = _called_logits(tile, head, softcap, logit_scale)
            parts.append(logits.topk(min(count, logits.shape[1]), sorted=False).values.float())
        return torch.cat(parts)


def head_divergences(
    reference: Tensor,
    reference_head: nn.Module,
    hidden: Tensor,
    head: nn.Module,
    *,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return KL(reference ‖ current) of rows, (n,) float32 in nats, without the logits.

    The products are float32, and the tiles eager ones on every device.

    Args:
        reference: (n, d) floating, hidden states of the reference model, a constant.
        reference_head: the head that they belong to, a constant; softcap and logit_scale are both
            heads'.
        hidden: (n, d) floating, those of the model in training.
        head: as for `weighted_head_loss`, and so are softcap and logit_scale.

    Raises:
        ValueError: the two heads have not as many classes.
    """
    options = logit_scale, softcap
    layer: Head | nn.Module = OutputModule(reference_head, *options)
    if _is_plain(reference_head):
        layer = _read(reference_head, reference_head.weight.dtype, softcap, logit_scale)
    base = Predictions(reference.detach(), layer)
    if not _is_plain(head):
        return kl_to_called(base, hidden, OutputModule(head, *options))
    return kl_to(base, hidden, head.weight, head.bias, scale=logit_scale, softcap=softcap)


class _FusedLoss(torch.autograd.Function):
    """Σ coefficient · loss, whose forward pass makes the gradients that backward returns."""

    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        targets: Tensor,
        coefficients: Tensor,
        softcap: float | None,
        logit_scale: float,
    ) -> Tensor:
        ctx.logit_options = logit_scale, softcap
        inputs = hidden, weight, bias, targets, coefficients
        losses, ctx.gradients = _run_tiles(ctx, *inputs)
        ctx.save_for_backward(*inputs, losses)
        return (losses * coefficients).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (factor,) = gradients
        *inputs, losses = ctx.saved_tensors
        # `ctx` lets go of the gradients, so that nobody else has them and they can be scaled in
        # place. A second backward pass, under retain_graph=True, has to make them again.
        parts, ctx.gradients = ctx.gradients, None
        if parts is None:
            _, parts = _run_tiles(ctx, *inputs)
        # A factor of 1 needs no pass over the gradients. On a GPU the host would have to wait for
        # the factor to compare it.
        if not factor.is_cpu or factor != 1:
            parts = [None if part is None else part.mul_(factor.to(part.dtype)) for part in parts]
        d_coefficients = losses * factor if ctx.needs_input_grad[4] else None
        return *parts, None, d_coefficients, None, None


def _run_tiles(
    ctx: Any,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of rows, and the gradients that autograd asks of `ctx`."""
    head = Head(weight.to(hidden.dtype), bias, *ctx.logit_options)
    return losses_and_gradients(hidden, head, targets, coefficients, ctx.needs_input_grad[:3])


def _called_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    coefficients: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """The same loss with a head that must be called; a tile's gradient makes its logits again."""

    def part(hidden: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
        losses = _called_losses(hidden, head, targets, softcap, logit_scale)
        return (losses * coefficients.to(losses)).sum()

    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for tile in _tiles(head, hidden, targets, coefficients):
        total = total + checkpoint(part, *tile, use_reentrant=False)
    return total


def _tiles(head: nn.Module, *tensors: Tensor) -> Iterator[tuple[Tensor, ...]]:
    """The rows of all tensors, as many at a time as a tile of the head's logits has."""
    rows = rows_of_a_tile(getattr(head, "weight", None))
    return zip(*(tensor.split(rows) for tensor in tensors), strict=True)


def _called_losses(
    hidden: Tensor, head: nn.Module, targets: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    """The losses of a tile's rows."""
    logits = _called_logits(hidden, head, softcap, logit_scale)
    return F.cross_entropy(logits, targets, reduction="none")


def _called_logits(
    hidden: Tensor, head: nn.Module, softcap: float | None, logit_scale: float
) -> Tensor:
    """The logits of a tile's rows; nothing is changed in place, so that autograd can follow."""
    logits: Tensor = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    return logits if softcap is None else softcap * torch.tanh(logits / softcap)


def _read(head: nn.Linear, dtype: torch.dtype, softcap: float | None, logit_scale: float) -> Head:
    """A plain head as a constant, its weight in a dtype."""
    bias = None if head.bias is None else head.bias.detach()
    return Head(head.weight.detach().to(dtype), bias, logit_scale, softcap)


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether hidden · weightᵀ + bias is all that calling the head does."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)
