"""A language model's output layer: its weight, and what the model does to its logits."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, nn


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
    """Return the head that a module and a Hugging Face configuration describe, None if none.

    Only a plain `nn.Linear` with a dense weight can be read: adapters, quantised and sharded layers
    must be called, because their products are not those of their weight. So must a layer whose
    scale is negative, which would turn the −inf that marks a target's product (tiles.py) into +inf.
    What a model does to its logits beyond the configuration shows only when losses are compared
    with the model's own, as flowdata/scoring/check.py does.
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


def kernels(head: Head, *, compiled: bool) -> list[tuple[str, Head]]:
    """Return the kernels that can run a head where its weight is, named, fastest first.

    Args:
        head: the head, with the eager kernel.
        compiled: whether the model's layers are compiled, so that the head may be compiled too.

    Returns:
        What each kernel is called in a sentence, and the head with that kernel; eager comes last.
    """
    choices = [("a tiled head", head)]
    if head.weight.is_cuda and find_spec("triton") is not None:
        choices.insert(0, ("a Triton head", replace(head, kernel="triton")))
    elif compiled:
        choices.insert(0, ("a compiled tiled head", replace(head, kernel="compiled")))
    return choices


def logit_options(config: Any) -> tuple[float, float | None]:
    """Return the scale and the softcap of a model's logits, by its Hugging Face configuration.

    Architectures name them differently: Cohere multiplies by `logit_scale`, Granite divides by
    `logits_scaling`, Falcon H1 multiplies by `lm_head_multiplier`; Gemma 2 bounds them by
    `final_logit_softcapping`, RecurrentGemma by `logits_soft_cap`.
    """
    scale = float(getattr(config, "logit_scale", None) or 1.0)
    scale /= float(getattr(config, "logits_scaling", None) or 1.0)
    scale *= float(getattr(config, "lm_head_multiplier", None) or 1.0)
    softcap = getattr(config, "final_logit_softcapping", None)
    return scale, softcap or getattr(config, "logits_soft_cap", None)


def finish_logits(
    logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Return what a model makes of products, in place: plus bias, times scale, then the softcap.

    Args:
        logits: (n, V) or (n,) float32 or float64 products, which are written over.
        bias: (V,) or (n,), or None.
        scale: factor on the logits.
        softcap: their bound, or None.
    """
    if bias is not None:
        logits += bias
    if scale != 1.0:
        logits *= scale
    if softcap is not None:
        logits = logits.div_(softcap).tanh_().mul_(softcap)
    return logits
