"""A language model's output layer: its weight, and how its logits are scaled and capped."""

from __future__ import annotations

from dataclasses import dataclass, replace
from importlib.util import find_spec
from typing import Any, Literal

from torch import Tensor, nn


@dataclass(frozen=True)
class Head:
    """A linear output layer, and the scale, softcap and kernel of its logits.

    logits = softcap · tanh((hidden · weightᵀ + bias) · scale / softcap), without the tanh where
    `softcap` is None.

    Attributes:
        weight: (V, d) floating.
        bias: (V,) floating, or None.
        scale: factor on the logits, positive.
        softcap: their bound, or None.
        kernel: how the logits are summed up: ``"eager"``, ``"compiled"`` (one fused pass, after
            some seconds of compiling), or ``"triton"`` (logits stay on the chip; CUDA only).
    """

    weight: Tensor
    bias: Tensor | None = None
    scale: float = 1.0
    softcap: float | None = None
    kernel: Literal["eager", "compiled", "triton"] = "eager"


class OutputModule(nn.Module):
    """An output layer, and what its model does to the logits.

    Args:
        layer: makes logits of rows; None where the rows are logits.
        scale: factor on the logits.
        softcap: their bound, or None.
        bias: (V,), which the model adds to what the layer makes, or None.
    """

    bias: Tensor | None

    def __init__(
        self,
        layer: nn.Module | None,
        scale: float = 1.0,
        softcap: float | None = None,
        bias: Tensor | None = None,
    ) -> None:
        super().__init__()
        self.layer, self.scale, self.softcap = layer, scale, softcap
        self.register_buffer("bias", bias, persistent=False)

    def forward(self, rows: Tensor) -> Tensor:
        """Rows (n, d) to logits (n, V)."""
        dtype = next((p.dtype for p in self.parameters() if p.is_floating_point()), rows.dtype)
        logits: Tensor = rows if self.layer is None else self.layer(rows.to(dtype))
        logits = logits.float() if self.bias is None else logits.float() + self.bias
        logits = logits * self.scale
        return logits if self.softcap is None else self.softcap * (logits / self.softcap).tanh()


def weight_of(layer: Head | nn.Module) -> Tensor | None:
    """Return an output layer's weight, (V, d); None where rows are logits and no layer makes them.

    Args:
        layer: a head that is read, or a module that has to be called.
    """
    if isinstance(layer, Head):
        return layer.weight
    inner = layer.layer if isinstance(layer, OutputModule) else layer
    weight = getattr(
        inner, "weight", None
    )  # of a layer with a parametrization it is made of others
    if isinstance(weight, Tensor) and weight.dim() > 1:
        return weight
    return next((each for each in layer.parameters() if each.dim() > 1), None)


def read_head(module: nn.Module | None, config: Any) -> Head | None:
    """Return the head that a module and a Hugging Face configuration describe, or None.

    Only a plain `nn.Linear` with a dense weight can be read. Adapters, quantised and sharded layers
    must be called, because their products are not those of their weight. A layer whose scale is
    negative must be called as well: the scale would turn the −inf that marks a target's product
    (tiles.py) into +inf. Some models change their logits in ways that the configuration does not
    tell; flowdata/scoring/check.py finds those, by comparing losses with the model's own.
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
    """Return the kernels that can run a head on its weight's device, the fastest first.

    Args:
        head: the head, with the eager kernel.
        compiled: whether the model's layers are compiled, so that the head may be compiled too.

    Returns:
        The name of each kernel, to stand in a sentence, and the head with that kernel. The eager
        one comes last.
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


def added_bias(model: nn.Module) -> Tensor | None:
    """Return the bias, (V,), that a model adds to what its output layer makes, or None.

    BART, Marian and their like have one, which is zero unless a checkpoint says otherwise.
    """
    bias = getattr(model, "final_logits_bias", None)
    return bias.detach().flatten() if isinstance(bias, Tensor) and bias.any() else None


def finish_logits(
    logits: Tensor, bias: Tensor | None, scale: float, softcap: float | None
) -> Tensor:
    """Turn products into logits in place, and return them: add the bias, scale, then softcap.

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


def softcap_slopes(logits: Tensor, softcap: float) -> Tensor:
    """Return the derivative of z → softcap · tanh(z / softcap), from its values.

    The derivative of tanh is 1 − tanh², and tanh(z / softcap) is the capped logit over the softcap.

    Args:
        logits: of any shape, after the softcap.
        softcap: their bound.
    """
    return (logits / softcap).square_().neg_().add_(1)
