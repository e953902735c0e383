"""Losses of target tokens from hidden states, tile by tile, so that no logits are ever held.

One tile of products at a time, whose four sums are added up over the vocabulary::

                 vocabulary →
               ┌────────┬────────┬────────┐
      rows  ↓  │ tile   │ next   │   …    │   hidden (rows, d) · weight[slice]ᵀ (d, slice)
               └────────┴────────┴────────┘
                    └── folded into ──→ one loss for each row
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Sequence
from dataclasses import replace
from importlib.util import find_spec
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.head.output_layer import LOWEST, Head, Tally, finish_logits, merge

# Rows of an eager tile for each thread: with 2,048 classes in float32 half a MiB, which fits the
# second-level cache of the CPUs measured (1 MiB on AMD EPYC, 2 MiB on Intel with AMX).
_ROWS_OF_A_CORE = 64


def kernels(head: Head, *, compiled: bool) -> list[tuple[str, Head]]:
    """Return the ways in which a head can be run where its weight is, named, fastest first."""
    ways = [("a tiled head", head)]
    if head.weight.is_cuda and find_spec("triton") is not None:
        ways.insert(0, ("a Triton head", replace(head, kernel="triton")))
    elif compiled:
        ways.insert(0, ("a compiled tiled head", replace(head, kernel="compiled")))
    return ways


def target_losses(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    """Return −log softmax(logits)[target] of every row: the losses of `target_values`."""
    return target_values(hidden, head, targets)[0]


def target_values(
    hidden: Tensor, head: Head, targets: Tensor, columns: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of every row's target and further columns, computed tile by tile.

    The loss is log(1 + Σ exp(z − target's z)) over all other classes, added up in float32, and
    the target's own logit is a float32 dot product: a confident prediction's small loss keeps its
    relative accuracy, where the usual difference of two large numbers, one of them rounded, loses
    it.

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
        _values(h, head, t, columns)
        for h, t in zip(hidden.split(rows), targets.split(rows), strict=True)
    ]
    values = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
    return values.pop("loss"), values


def _values(
    hidden: Tensor, head: Head, targets: Tensor, columns: Sequence[str]
) -> dict[str, Tensor]:
    target = _target_logits(hidden, head, targets)
    on_host = hidden.device.type == "cpu"  # elsewhere a look at the odds would wait for them
    if not columns and head.kernel != "triton" and on_host:
        odds = _odds(hidden, head, targets, target)
        if odds.isfinite().all():
            return {"loss": odds.log1p()}
    tally = _tally(hidden, head, targets)
    gap = tally.top + tally.total.log() - target  # the logit of "any other class"
    values = {"loss": F.softplus(gap)}
    others = gap.sigmoid()  # 1 − p(target)
    if "entropy" in columns:
        # The entropy of the distribution over the other classes, given that one of them comes.
        within = tally.total.log() - tally.first / tally.total
        values["entropy"] = (
            torch.special.entr(others) + (-gap).sigmoid() * values["loss"] + others * within
        )
    if "correct" in columns:
        values["correct"] = (target > tally.top).float()
    if "gradient_norm" in columns:
        slope = _slope(target, head.softcap)
        norm = (tally.squares / tally.total.square() + slope * slope).sqrt() * others
        values["gradient_norm"] = norm * head.scale * hidden.float().norm(dim=1)
    return values


def _odds(hidden: Tensor, head: Head, targets: Tensor, target_logits: Tensor) -> Tensor:
    """Return (1 − p) / p of every target: Σ exp(z − z of the target) over all other classes.

    The target's logit takes the place of the running maximum of `_add_tally`, which spares a pass
    over each tile. The sum overflows float32 only beyond a loss of 88 nats; the caller then
    falls back on the tally.
    """
    odds = torch.zeros_like(target_logits)
    for rows, products, bias, buffer in _tiles(hidden, head, targets):
        add = _compiled(_add_odds) if buffer is None else _add_odds
        odds[rows] += add(products, buffer, bias, head.scale, head.softcap, target_logits[rows])
    return odds


def _add_odds(
    products: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    target_logits: Tensor,
) -> Tensor:
    logits = _logits(products, buffer, bias, scale, softcap)
    return logits.sub_(target_logits[:, None]).exp_().sum(1)


def _tally(hidden: Tensor, head: Head, targets: Tensor) -> Tally:
    if head.kernel == "triton":
        from flowdata.head.triton import partial_sums

        parts = partial_sums(hidden, head.weight, head.bias, targets, head.scale, head.softcap)
        return merge(Tally(*parts))
    sums = torch.zeros(4, len(hidden), device=hidden.device)
    sums[0] = LOWEST
    for rows, products, bias, buffer in _tiles(hidden, head, targets):
        add = _compiled(_add_tally) if buffer is None else _add_tally
        before = Tally(*sums[:, rows])
        after = add(products, buffer, bias, head.scale, head.softcap, before)
        torch.stack(after, out=sums[:, rows])
    return Tally(*sums)


def _add_tally(
    products: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    tally: Tally,
) -> Tally:
    # The online log-sum-exp (Milakov and Gimelshein, 2018): with m the largest logit so far and
    # m' that after this tile, Σ exp(z − m') = exp(m − m') · Σ exp(z − m) + this tile's share.
    # The other two sums follow by the same shift of their exponents.
    logits = _logits(products, buffer, bias, scale, softcap).clamp_min_(LOWEST)
    slope = _slope(logits, softcap)
    top = torch.maximum(tally.top, logits.amax(1))
    shift = tally.top - top
    factor = shift.exp()
    weights = logits.sub_(top[:, None]).exp()
    return Tally(
        top,
        factor * tally.total + weights.sum(1),
        factor * (tally.first + shift * tally.total) + logits.mul_(weights).sum(1),
        factor * factor * tally.squares + weights.mul_(slope).square_().sum(1),
    )


@functools.cache
def _compiled(add: Callable[..., Any]) -> Callable[..., Any]:
    """A function as one pass over a tile; compiled once for all models of a process."""
    return torch.compile(add, dynamic=True)


def _tiles(
    hidden: Tensor, head: Head, targets: Tensor
) -> Iterator[tuple[slice, Tensor, Tensor | None, Tensor | None]]:
    """Yield one tile after another: a slice of rows, their products with a slice of classes,
    the bias of those classes, and a buffer for float32 logits.

    A product with a row's own target is −inf, because the sums are over the other classes. A
    compiled pass takes all rows at once and needs no buffer. An eager one makes several passes
    over its float32 buffer, so its tiles are small enough to stay in a core's cache.
    """
    _, width = tile_size(hidden)
    in_passes = head.kernel == "eager" and not hidden.is_cuda
    step = _ROWS_OF_A_CORE * torch.get_num_threads() if in_passes else len(hidden)
    step = max(1, min(step, len(hidden)))
    buffer = torch.empty(step * width, device=hidden.device) if head.kernel == "eager" else None
    memory = hidden.new_empty(len(hidden) * width, dtype=_product_dtype(hidden))
    every = torch.arange(len(hidden), device=hidden.device)
    for start in range(0, len(head.weight), width):
        classes = slice(start, start + width)
        weight, bias = head.weight[classes], None if head.bias is None else head.bias[classes]
        shape = len(hidden), len(weight)
        products = _multiply(hidden, weight, memory[: shape[0] * shape[1]].view(shape))
        inside = (targets >= start) & (targets < start + shape[1])
        place = every, (targets - start).clamp_(0, shape[1] - 1)
        products.index_put_(place, products[place].masked_fill_(inside, -torch.inf))
        for first in range(0, len(hidden), step):
            rows = slice(first, first + step)
            yield rows, products[rows], bias, buffer


def tile_size(hidden: Tensor) -> tuple[int, int]:
    """Rows and classes of a tile of products."""
    return (4096, 8192) if hidden.is_cuda else (1024, 2048)


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """A GPU writes the products of low precision in float32; a CPU can't."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> Tensor:
    if out.dtype == hidden.dtype:
        return torch.mm(hidden, weight.t(), out=out)
    return torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)


def _logits(
    products: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """float32 logits of products, in the buffer if there is one; what was −inf stays lowest."""
    if buffer is None:
        logits = products.to(torch.float32, copy=True)
    else:
        logits = buffer[: products.numel()].view(products.shape).copy_(products)
    finish_logits(logits, bias, scale, softcap)
    return logits if softcap is None else logits.masked_fill_(products == -torch.inf, LOWEST)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | float:
    """What the softcap leaves of a logit's derivative."""
    return 1.0 if softcap is None else 1 - (logits / softcap).square()


def _target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    # In float32, not read off the low-precision products: the loss is a small difference of two
    # large logits, and this one's rounding error would stand in it whole.
    dots = (hidden.float() * head.weight[targets].float()).sum(1)
    bias = None if head.bias is None else head.bias[targets]
    return finish_logits(dots, bias, head.scale, head.softcap)
