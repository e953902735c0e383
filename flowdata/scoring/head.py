"""The head: losses of target tokens from hidden states, without ever holding the logits."""

from __future__ import annotations

import functools
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal, NamedTuple

import torch
import torch.nn.functional as F
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
        scale: factor on the logits.
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
    """Return −log softmax(logits)[target] of every row: the losses of `target_values`."""
    return target_values(hidden, head, targets)[0]


def target_values(
    hidden: Tensor, head: Head, targets: Tensor, columns: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of every row's target and further columns, computed tile by tile.

    Tiles of logits are added up in float32 over all classes but the target. Its own logit is a
    float32 dot product, and the loss is log(1 + Σ exp(other − target)): a confident prediction's
    small loss keeps its relative accuracy, where the usual difference of two large numbers, one
    of them rounded, loses it.

    Args:
        hidden: (n, d) floating.
        head: its weight has the dtype of `hidden`.
        targets: (n,) int64 in [0, V).
        columns: names of further columns, see columns.py.

    Returns:
        (n,) float32 losses in nats, never negative, and (n,) float32 for each name.
    """
    rows, _ = tile_size(hidden)
    parts = [
        _values(_tally(h, head, t, moments=bool(columns)), h, head, t, columns)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return values.pop("loss"), values


class Tally(NamedTuple):
    """What the logits z of all classes but the target add up to, (n,) float32 each.

    Attributes:
        top: the largest.
        total: Σ exp(z − top).
        first: Σ exp(z − top) · (z − top), or 0 where no column needs it.
        squares: Σ exp(2 (z − top)) · slope(z)², or 0 likewise.
    """

    top: Tensor
    total: Tensor
    first: Tensor
    squares: Tensor


def _values(
    tally: Tally, hidden: Tensor, head: Head, targets: Tensor, columns: Sequence[str]
) -> dict[str, Tensor]:
    """The loss and the named columns; `gap` is the logit of "any other class"."""
    target = _target_logits(hidden, head, targets)
    gap = tally.top + tally.total.log() - target
    values = {"loss": F.softplus(gap)}
    others = gap.sigmoid()  # 1 − p(target)
    if "entropy" in columns:
        within = tally.total.log() - tally.first / tally.total  # of the others among themselves
        values["entropy"] = (
            torch.special.entr(others) + (-gap).sigmoid() * values["loss"] + others * within
        )
    if "correct" in columns:
        values["correct"] = (target > tally.top).float()
    if "gradient_norm" in columns:
        slope = _slope(target, head.softcap)
        norm = (tally.squares / tally.total.square() + slope * slope).sqrt() * others
        values["gradient_norm"] = norm * abs(head.scale) * hidden.float().norm(dim=1)
    return values


def _tally(hidden: Tensor, head: Head, targets: Tensor, *, moments: bool) -> Tally:
    """Add up one tile of columns after another; `moments` asks for the last two sums."""
    if head.kernel == "triton":
        from flowdata.scoring import head_triton

        return head_triton.tally(hidden, head, targets, moments=moments)
    add = _compiled_add() if head.kernel == "compiled" else _add
    zeros = torch.zeros(len(hidden), device=hidden.device)
    tally = Tally(torch.full_like(zeros, LOWEST), zeros, zeros, zeros)
    _, columns = tile_size(hidden)
    product = hidden.new_empty(len(hidden) * columns, dtype=_product_dtype(hidden))
    logits = product.float()  # the same one if that is their dtype
    for start in range(0, len(head.weight), columns):
        weight = head.weight[start : start + columns]
        bias = None if head.bias is None else head.bias[start : start + columns]
        shape, size = (len(hidden), len(weight)), len(hidden) * len(weight)
        tile = _multiply(hidden, weight, product[:size].view(shape))
        buffer = None if head.kernel == "compiled" else logits[:size].view(shape)
        tally = add(tally, tile, buffer, bias, targets - start, head.scale, head.softcap, moments)
    return tally


def tile_size(hidden: Tensor) -> tuple[int, int]:
    """Rows and columns of a tile of logits; on a CPU it is to stay in a cache."""
    return (4096, 8192) if hidden.is_cuda else (1024, 2048)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """A GPU writes the products of low precision in float32; a CPU can't."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


@functools.cache
def _compiled_add() -> Any:
    """`_add` as one pass over a tile; compiled once for all models of a process."""
    return torch.compile(_add, dynamic=True)


def _add(
    tally: Tally,
    tile: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    moments: bool,
) -> Tally:
    """Add a tile of products, by way of a float32 buffer that is overwritten.

    Targets count from the tile's first column; a target's own logit is left out.
    """
    logits = tile.to(torch.float32, copy=True) if buffer is None else buffer.copy_(tile)
    finish_logits(logits, bias, scale, softcap)
    inside = (targets >= 0) & (targets < logits.shape[1])
    place = targets.clamp(0, logits.shape[1] - 1)[:, None]
    logits.scatter_(1, place, logits.gather(1, place).masked_fill_(inside[:, None], LOWEST))
    top = torch.maximum(tally.top, logits.amax(1))
    shift = tally.top - top
    factor = shift.exp()
    if not moments:
        total = factor * tally.total + logits.sub_(top[:, None]).exp_().sum(1)
        return Tally(top, total, tally.first, tally.squares)
    logits.clamp_min_(LOWEST)  # a class ruled out by a bias of −inf
    slope = _slope(logits, softcap)
    weights = logits.sub_(top[:, None]).exp()
    return Tally(
        top,
        factor * tally.total + weights.sum(1),
        factor * (tally.first + shift * tally.total) + logits.mul_(weights).sum(1),
        factor * factor * tally.squares + weights.mul_(slope).square_().sum(1),
    )


def _slope(logits: Tensor, softcap: float | None) -> Tensor | float:
    """What the softcap leaves of a logit's derivative."""
    return 1.0 if softcap is None else 1 - (logits / softcap).square()


def _target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    dots = (hidden.float() * head.weight[targets].float()).sum(1)
    bias = None if head.bias is None else head.bias[targets]
    return finish_logits(dots, bias, head.scale, head.softcap)


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
