"""A language model's output layer: its weight, and what the model does to its logits."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

from torch import Tensor, nn

LOWEST = -1e15  # below every logit; finite, its square too, so that 0 · (z − top) is 0


@dataclass(frozen=True)
class Head:
    """A linear output layer and what the model does to its logits.

    logits = softcap · tanh((hidden · weightᵀ + bias) · scale / softcap), without the tanh where
    `softcap` is None.

    Attributes:
        weight: (V, d) floating.
        bias: (V,) floating, or None.
        scale: factor on the logits, positive.
        softcap: their bound, or None.
        kernel: how tiles are added up: ``"eager"``, ``"compiled"`` (one fused pass, after some
            seconds of compiling), or ``"triton"`` (logits stay on the chip; CUDA only).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    kernel: Literal["eager", "compiled", "triton"] = "eager"


def read_head(module: nn.Module | None, config: Any) -> Head | None:
    """Return the head that a module and a Hugging Face configuration describe.

    None unless the module is a plain `nn.Linear` with a dense weight: adapters, quantised and
    sharded layers must be called, and so must those whose scale is negative. A configuration
    can't say everything; compare before use.
    """
    if type(module) is not nn.Linear or type(module.weight) is not nn.Parameter:
        return None
    if module._forward_hooks or module._forward_pre_hooks:
        return None
    scale, softcap = logit_options(config)
    if scale < 0:
        return None
    return Head(
        module.weight.detach(),
        None if module.bias is None else module.bias.detach(),
        scale,
        softcap,
    )


def logit_options(config: Any) -> tuple[float, float | None]:
    """Return the scale and the softcap that a Hugging Face configuration tells of."""
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, softcap or getattr(config, "logits_soft_cap", None)


class Tally(NamedTuple):
    """What the logits z of all classes but the target add up to, (n,) float32 each.

    Attributes:
        top: the largest.
        total: Σ exp(z − top).
        first: Σ exp(z − top) · (z − top).
        squares: Σ exp(2 (z − top)) · slope(z)².
    """

    top: Tensor
    total: Tensor
    first: Tensor
    squares: Tensor


def finish_logits(
    logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """What the model does to float32 logits after the matrix product; in place."""
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits


def merge(parts: Tally) -> Tally:
    """Return the tally of several parts' classes together, from fields of shape (parts, n)."""
    top = parts.top.amax(0)
    shift = parts.top - top
    factor = shift.exp()
    return Tally(
        top,
        (factor * parts.total).sum(0),
        (factor * (parts.first + shift * parts.total)).sum(0),
        (factor * factor * parts.squares).sum(0),
    )
