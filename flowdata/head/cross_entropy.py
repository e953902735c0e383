"""Cross-entropies of logits, for losses that are weighted afterwards."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor


def cross_entropies(logits: Tensor, targets: Tensor) -> Tensor:
    """Return the cross-entropy of every row.

    The function differs from ``F.cross_entropy(..., reduction="none")`` in two ways. A row whose
    loss has no weight gets a gradient of 0 even if its logits are NaN. The forward pass and the
    backward pass allocate one buffer of the logits' size each, where PyTorch's function takes two.

    Args:
        logits: (n, V) floating.
        targets: (n,) int64 in [0, V).

    Returns:
        (n,) in nats, float64 for float64 logits and float32 otherwise. They can be differentiated
        any number of times.

    Example:
        >>> import torch
        >>> cross_entropies(torch.zeros(2, 4), torch.tensor([0, 3]))  # log(4) each
        tensor([1.3863, 1.3863])
    """
    losses: Tensor = _CrossEntropy.apply(logits, targets)  # type: ignore[no-untyped-call]
    return losses


class _CrossEntropy(torch.autograd.Function):
    """The loss of a row is log Σ exp(logits) − the target's logit."""

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        places = targets[:, None]
        values = logits.to(torch.promote_types(logits.dtype, torch.float32))
        log_sums = values.logsumexp(1)
        # The logits are saved in the dtype they have: a float32 copy would be a second buffer.
        ctx.save_for_backward(logits, log_sums, places)
        return log_sums - values.gather(1, places).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        # The gradient of a row is its factor · (softmax(logits) − one-hot(target)). The softmax
        # is made again from the logits and their log-sum: exp(logits − log_sum).
        logits, log_sums, places = ctx.saved_tensors
        factors = gradients[0][:, None]
        values = logits.to(log_sums.dtype)
        if torch.is_grad_enabled():
            # Under create_graph=True autograd differentiates this pass: nothing changes in place.
            product = (values.softmax(1) * factors).scatter_add(1, places, -factors)
            return product.masked_fill(factors == 0, 0.0).to(logits.dtype), None
        product = (values - log_sums[:, None]).exp_().mul_(factors)
        product.scatter_add_(1, places, -factors)
        # 0 · NaN is NaN, so rows whose factor is 0 are filled with 0 instead of multiplied by it.
        return product.masked_fill_(factors == 0, 0.0).to(logits.dtype), None
