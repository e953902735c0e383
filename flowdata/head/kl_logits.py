"""KL divergence to the predictions of reference logits, from logits that a model has returned."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def kl_of_logits(reference: Tensor, logits: Tensor) -> Tensor:
    """Return KL(p ‖ q) of every row, p = softmax(reference) and q = softmax(logits).

    A row whose divergence has no weight gets a gradient of 0 even if its logits are NaN.

    Args:
        reference: (n, V) floating, a constant.
        logits: (n, V) floating.

    Returns:
        (n,) in nats, float64 for float64 logits and float32 otherwise. They can be differentiated
        any number of times.

    Raises:
        ValueError: the two have not as many rows and classes.

    Example:
        >>> import torch
        >>> logits = torch.tensor([[0.0, 0.0], [2.0, 0.0]])
        >>> kl_of_logits(torch.zeros(2, 2), logits)
        tensor([0.0000, 0.4338])
    """
    if reference.shape != logits.shape:
        shapes = " and ".join(str(tuple(each.shape)) for each in (reference, logits))
        raise ValueError(
            f"reference and logits must be predictions of the same rows and classes, got {shapes}"
        )
    values: Tensor = _KL.apply(logits, reference.detach())  # type: ignore[no-untyped-call]
    return values


class _KL(torch.autograd.Function):
    """∂ KL(p ‖ q) / ∂ logits = q − p."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, reference: Tensor) -> Tensor:
        exact = torch.promote_types(logits.dtype, torch.float32)
        q, p = logits.to(exact).log_softmax(1), reference.to(exact).log_softmax(1)
        # The logits are saved in the dtype they have: float32 copies would be further buffers.
        ctx.save_for_backward(logits)
        ctx.reference = reference  # a constant, which may come from inference mode
        probabilities = p.exp()
        terms = torch.sub(p, q, out=q).mul_(probabilities)
        # A class that p rules out adds nothing, and 0 · inf is NaN.
        terms.masked_fill_(probabilities == 0, 0.0)
        return terms.sum(1).clamp_min_(0.0)  # only rounding makes it negative

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        (logits,), reference = ctx.saved_tensors, ctx.reference
        factors = gradients[0][:, None]
        exact = factors.dtype
        slopes = (logits.to(exact).softmax(1) - reference.to(exact).softmax(1)) * factors
        # 0 · NaN is NaN, so rows whose factor is 0 are filled with 0 instead of multiplied by it.
        return slopes.masked_fill(factors == 0, 0.0).to(logits.dtype), None
