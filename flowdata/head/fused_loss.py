"""Head and weighted cross-entropy in one: loss and gradients without the logits.

Rows of hidden states go through the head a tile at a time, and a tile of logits becomes the
tile's part of the loss and of the gradients before the next one overwrites it. That the weights
are known beforehand is what makes one pass enough: Σ coefficient · loss has gradients that need
no second look at the logits, so the work is that of the plain head (three matrix products).
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, TypeGuard

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdata.head.output_layer import Head, finish_logits
from flowdata.head.tiled import target_losses

_TILE = 1 << 25  # logits held at a time: 128 MiB in float32, 128 rows at a vocabulary of 256k
_FEWEST_ROWS = 64  # below which the weight's gradient is read and written too often
_COLUMNS = 8192  # of the weight's gradient in low precision, until it is added in float32


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
        head: d → V; a plain `nn.Linear` is fused, any other module is called tile by tile and
            run again in the backward pass.
        targets: (n,) int64 in [0, V).
        coefficients: (n,) floating.
        softcap: logits become softcap · tanh(logits / softcap), after the scale.
        logit_scale: factor on the logits.

    Returns:
        0-d, float64 for float64 hidden states and float32 otherwise.
    """
    if not _is_plain(head):
        return _called_loss(hidden, head, targets, coefficients, softcap, logit_scale)
    device = hidden.device.type
    if torch.is_autocast_enabled(device) and hidden.dtype != torch.float64:
        hidden = hidden.to(torch.get_autocast_dtype(device))
    with torch.autocast(device, enabled=False):
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
    """Return the (n,) float32 losses of rows, without gradients and without the logits."""
    with torch.no_grad():
        if _is_plain(head):
            bias = None if head.bias is None else head.bias.detach()
            plain = Head(head.weight.detach().to(hidden.dtype), bias, logit_scale, softcap)
            return target_losses(hidden.detach(), plain, targets)
        rows = _rows(getattr(head, "weight", None))
        tiles = zip(hidden.split(rows), targets.split(rows), strict=True)
        parts = [_tile_losses(h, head, t, softcap, logit_scale).float() for h, t in tiles]
        return torch.cat(parts) if parts else hidden.new_zeros(0, dtype=torch.float32)


class _FusedLoss(torch.autograd.Function):
    """Σ coefficient · loss; its gradients are made in the forward pass and handed out later."""

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
        losses, ctx.parts = _loss_and_gradients(
            hidden,
            weight,
            bias,
            targets,
            coefficients,
            softcap,
            logit_scale,
            needs=ctx.needs_input_grad[:3],
        )
        ctx.save_for_backward(hidden, weight, bias, targets, coefficients, losses)
        ctx.logit_options = softcap, logit_scale
        return (losses * coefficients).sum()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        (gradient,), (*inputs, losses) = gradients, ctx.saved_tensors
        parts, ctx.parts = ctx.parts, None  # given away, not copied
        if parts is None:  # a second backward pass, under retain_graph=True
            needs = ctx.needs_input_grad[:3]
            _, parts = _loss_and_gradients(*inputs, *ctx.logit_options, needs=needs)
        if not gradient.is_cpu or gradient != 1:
            parts = [None if part is None else part.mul_(gradient.to(part.dtype)) for part in parts]
        d_coefficients = losses * gradient if ctx.needs_input_grad[4] else None
        return *parts, None, d_coefficients, None, None


def _loss_and_gradients(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    coefficients: Tensor,
    softcap: float | None,
    logit_scale: float,
    *,
    needs: Sequence[bool],
) -> tuple[Tensor, list[Tensor | None]]:
    """The losses of rows, and what Σ coefficient · loss adds to hidden, weight and bias."""
    exact = torch.promote_types(hidden.dtype, torch.float32)
    head = Head(weight.to(hidden.dtype), bias, logit_scale, softcap)
    d_hidden = torch.empty_like(hidden) if needs[0] else None
    d_weight = torch.zeros_like(weight, dtype=exact) if needs[1] else None
    d_bias = torch.zeros_like(bias, dtype=exact) if bias is not None and needs[2] else None
    losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    products = hidden.new_empty(min(len(hidden), _rows(weight)), len(weight))
    values = products if hidden.dtype == exact else products.to(exact)
    for start in range(0, len(hidden), max(1, len(products))):
        rows = slice(start, start + len(products))
        target, scale = targets[rows, None], coefficients[rows, None].to(exact) * logit_scale
        product, value = products[: len(target)], values[: len(target)]
        torch.mm(hidden[rows], head.weight.t(), out=product)
        if value.dtype != product.dtype:
            value.copy_(product)
        finish_logits(value, bias, logit_scale, softcap)
        slope = None if softcap is None else (value / softcap).square_().neg_().add_(1)
        top, picked = value.amax(1, keepdim=True), value.gather(1, target)
        total = value.sub_(top).exp_().sum(1, keepdim=True)
        losses[rows] = (total.log() + (top - picked)).squeeze(1)
        if not any(needs):
            continue
        # `value` becomes the loss's gradient in what the matrix product alone computed.
        value.mul_(scale / total).scatter_add_(1, target, -scale)
        if slope is not None:
            value.mul_(slope)
        if value.dtype != product.dtype:
            product.copy_(value)
        if d_hidden is not None:
            torch.mm(product, head.weight, out=d_hidden[rows])
        if d_weight is not None:
            _add_product(d_weight, product, hidden[rows])
        if d_bias is not None:
            d_bias += value.sum(0)
    return losses, [d_hidden, d_weight, d_bias]


def _add_product(total: Tensor, rows: Tensor, hidden: Tensor) -> None:
    """total += rowsᵀ · hidden; in low precision each product is added in `total`'s dtype."""
    if rows.dtype == total.dtype:
        total.addmm_(rows.t(), hidden)
        return
    for start in range(0, len(total), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        total[columns] += rows[:, columns].t() @ hidden


def _called_loss(
    hidden: Tensor,
    head: nn.Module,
    targets: Tensor,
    coefficients: Tensor,
    softcap: float | None,
    logit_scale: float,
) -> Tensor:
    """The same with a head that must be called: a tile's logits are made again for its gradient."""

    def part(hidden: Tensor, targets: Tensor, coefficients: Tensor) -> Tensor:
        losses = _tile_losses(hidden, head, targets, softcap, logit_scale)
        return (losses * coefficients.to(losses)).sum()

    rows = _rows(getattr(head, "weight", None))
    total = hidden.new_zeros((), dtype=torch.promote_types(hidden.dtype, torch.float32))
    for tile in zip(hidden.split(rows), targets.split(rows), coefficients.split(rows), strict=True):
        total = total + checkpoint(part, *tile, use_reentrant=False)
    return total


def _tile_losses(
    hidden: Tensor, head: nn.Module, targets: Tensor, softcap: float | None, logit_scale: float
) -> Tensor:
    logits = head(hidden)
    logits = logits.to(torch.promote_types(logits.dtype, torch.float32)) * logit_scale
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return F.cross_entropy(logits, targets, reduction="none")


def _is_plain(head: nn.Module) -> TypeGuard[nn.Linear]:
    """Whether reading the weight is the same as calling the head."""
    if type(head) is not nn.Linear or type(head.weight) is not nn.Parameter:
        return False
    return not (head._forward_hooks or head._forward_pre_hooks or head._backward_hooks)


def _rows(weight: Tensor | None) -> int:
    columns = len(weight) if weight is not None and weight.dim() == 2 else _TILE // _FEWEST_ROWS
    return max(_FEWEST_ROWS, _TILE // columns)
