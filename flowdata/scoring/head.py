"""The head: losses of target tokens from hidden states, without ever holding the logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

_ROWS, _COLUMNS = 1024, 2048  # one tile of logits: stays in a core's cache


@dataclass(frozen=True)
class Head:
    """A linear output layer and what the model does to its logits.

    logits = softcap · tanh((hidden · weightᵀ + bias) · scale / softcap), without the tanh where
    `softcap` is None.

    Attributes:
        weight: (V, d) floating.
        bias: (V,) floating, or None.
        scale: factor on the logits.
        softcap: their bound, or None.
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None


def read_head(module: nn.Module | None, config: Any) -> Head | None:
    """Return the head that a module and a Hugging Face configuration describe.

    None unless the module is a plain `nn.Linear` with a dense weight: adapters, quantised and
    sharded layers must be called. A configuration can't say everything; compare before use.
    """
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    return Head(
        module.weight.detach(),
        None if module.bias is None else module.bias.detach(),
        scale,
        getattr(config, "final_logit_softcapping", None),
    )


def target_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return −log softmax(logits)[target] of every row, computed tile by tile.

    The log-sum-exp runs in float32 over tiles of logits that the matrix product leaves in the
    hidden states' dtype; the target's own logit is a float32 dot product, which is where most
    of a low-precision loss's error would come from.

    Args:
        hidden: (n, d) floating.
        head: its weight has the dtype of `hidden`.
        targets: (n,) int64 in [0, V).

    Returns:
        (n,) float32, nats, never negative.
    """
    losses = torch.empty(len(hidden), dtype=torch.float32, device=hidden.device)
    for start in range(0, len(hidden), _ROWS):
        rows = slice(start, start + _ROWS)
        target_logits = _target_logits(hidden[rows], head, targets[rows])
        losses[rows] = _log_sum_exp(hidden[rows], head).sub_(target_logits).clamp_min_(0)
    return losses


def _log_sum_exp(hidden: Tensor, head: Head) -> Tensor:
    """(n,) float32 over the vocabulary, one tile of columns after another."""
    total = torch.full((len(hidden),), -torch.inf, device=hidden.device)
    tile = hidden.new_empty(len(hidden) * _COLUMNS)
    for start in range(0, len(head.weight), _COLUMNS):
        columns = slice(start, start + _COLUMNS)
        weight = head.weight[columns]
        out = tile[: len(hidden) * len(weight)].view(len(hidden), len(weight))
        logits = torch.mm(hidden, weight.t(), out=out).float()
        bias = None if head.bias is None else head.bias[columns]
        total = torch.logaddexp(total, finish_logits(logits, bias, head).logsumexp(1))
    return total


def _target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    dots = (hidden.float() * head.weight[targets].float()).sum(1)
    return finish_logits(dots, None if head.bias is None else head.bias[targets], head)


def finish_logits(logits: Tensor, bias: Tensor | None, head: Head) -> Tensor:
    """What the model does to float32 logits after the matrix product; in place."""
    if bias is not None:
        logits += bias
    if head.scale != 1.0:
        logits *= head.scale
    if head.softcap is not None:
        logits = logits.div_(head.softcap).tanh_().mul_(head.softcap)
    return logits
