"""KL divergence to fixed predictions, with gradients and without the logits.

The forward pass adds the sums of kl.py up, tile by tile. The backward pass makes each tile's logits
again, because their slopes need the whole row's log-sum::

    forward     a, b of a tile ──→ sums ──→ KL(p ‖ q) and both log-sums of every row
    backward    a, b of a tile ──→ q − p ──→ d_hidden, d_weight, d_bias

    ∂ KL(p ‖ q) / ∂ b = q − p
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from flowdata.head.kl import Predictions, Sums, divergences_of, logits_of, tiles
from flowdata.head.kl_logits import kl_of_logits
from flowdata.head.output_layer import Head, softcap_slopes

_ROWS_AT_ONCE = 256  # of logits that a called layer makes


def kl_to(
    base: Predictions,
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> Tensor:
    """Return KL(p ‖ q) of every row, (n,) float32 in nats, differentiable in q's hidden states.

    Args:
        base: gives p, which has no gradient.
        hidden: (n, d) floating, the rows that give q.
        weight: (V, d) floating, of the output layer that gives q.
        bias: (V,) floating, or None.
        scale: factor on the logits of q.
        softcap: their bound, or None.

    Example:
        >>> hidden = torch.ones(2, 4, requires_grad=True)
        >>> base = Predictions(torch.zeros(2, 4), Head(torch.eye(4)))
        >>> kl_to(base, hidden, 2 * torch.eye(4))  # both uniform
        tensor([0., 0.], grad_fn=<_KLBackward>)
    """
    values: Tensor = _KL.apply(hidden, weight, bias, base, scale, softcap)  # type: ignore[no-untyped-call]
    return values


def kl_to_called(base: Predictions, hidden: Tensor, layer: nn.Module) -> Tensor:
    """Return KL(p ‖ q) of every row, where q's layer has to be called; (n,) float32.

    A few rows have logits at a time, which the backward pass makes again.

    Args:
        base: gives p, which has no gradient.
        hidden: (n, d) floating, the rows that give q.
        layer: makes their logits, scaled and capped; its parameters have gradients, too.
    """
    parts = zip(base.rows.split(_ROWS_AT_ONCE), hidden.split(_ROWS_AT_ONCE), strict=True)
    values = [checkpoint(_of_called, base, p, q, layer, use_reentrant=False) for p, q in parts]
    return torch.cat(values)


def _of_called(base: Predictions, p_rows: Tensor, q_rows: Tensor, layer: nn.Module) -> Tensor:
    """KL(p ‖ q) of some rows from their logits, all classes at once."""
    with torch.no_grad():
        reference = logits_of(Predictions(p_rows, base.layer))
    return kl_of_logits(reference, layer(q_rows)).float()


class _KL(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        hidden: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        base: Predictions,
        scale: float,
        softcap: float | None,
    ) -> Tensor:
        tuned = Predictions(hidden, Head(weight, bias, scale, softcap))
        p, q = Sums.of(base, tuned)
        ctx.save_for_backward(hidden, weight, bias, p.log_sum(), q.log_sum())
        ctx.base, ctx.options = base, (scale, softcap)
        return divergences_of(p, q).kl.float()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        hidden, weight, bias, log_sum_p, log_sum_q = ctx.saved_tensors
        scale, softcap = ctx.options
        # A row that is infinitely far away has no direction to go back in.
        factors = (gradients[0] * scale).float().nan_to_num(0.0, 0.0, 0.0)[:, None]
        d_hidden = torch.zeros_like(hidden, dtype=torch.float32)
        d_weight = d_bias = None
        if ctx.needs_input_grad[1]:
            d_weight = torch.zeros_like(weight, dtype=torch.float32)
        if bias is not None and ctx.needs_input_grad[2]:
            d_bias = torch.zeros_like(bias, dtype=torch.float32)
        tuned = Predictions(hidden, Head(weight, bias, scale, softcap))
        for tile in tiles(ctx.base, tuned):
            rows, span = tile.rows, slice(tile.first_class, tile.first_class + tile.a.shape[1])
            cap_slopes = None if softcap is None else softcap_slopes(tile.b, softcap)
            p = tile.a.sub_(log_sum_p[rows, None]).exp_()
            slopes = tile.b.sub_(log_sum_q[rows, None]).exp_().sub_(p).mul_(factors[rows])
            if cap_slopes is not None:
                slopes.mul_(cap_slopes)
            d_hidden[rows].addmm_(slopes, weight[span].float())
            if d_weight is not None:
                d_weight[span].addmm_(slopes.t(), hidden[rows].float())
            if d_bias is not None:
                d_bias[span] += slopes.sum(0)
        parts = (d_hidden, hidden), (d_weight, weight), (d_bias, bias)
        return *(None if d is None else d.to(value.dtype) for d, value in parts), None, None, None
