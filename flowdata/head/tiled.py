"""Losses of target tokens from hidden states, tile by tile: the logits never exist as a whole.

Each tile of logits (tiles.py) is folded into a few sums for every row, and the loss and the further
columns are made of these sums at the end. On a GPU triton.py makes the sums without tiles.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.head.output_layer import Head, finish_logits, softcap_slopes
from flowdata.head.tally import LOWEST, Tally, merge
from flowdata.head.tiles import tile_size, tiles
from flowdata.models.compiled import one_pass


def target_values(
    hidden: Tensor, head: Head, targets: Tensor, columns: Sequence[str] = ()
) -> tuple[Tensor, dict[str, Tensor]]:
    """Return the loss of every row's target and further columns, computed tile by tile.

    The loss is log(1 + Σ exp(z − target's z)), where the sum is over all other classes, in float32,
    and the target's logit is a float32 dot product. The small loss of a confident prediction thus
    keeps its relative accuracy. The usual difference of log-sum-exp and target logit loses it: both
    are large, and one is rounded to the model's dtype.

    Args:
        hidden: (n, d) floating.
        head: its weight has the dtype of `hidden`.
        targets: (n,) int64 in [0, V).
        columns: names of further columns, see flowdata/targets/columns.py.

    Returns:
        (n,) float32 losses in nats, never negative, and (n,) float32 for each name.

    Example:
        >>> head = Head(torch.zeros(4, 8))  # all logits are 0: four classes, equally likely
        >>> losses, columns = target_values(torch.ones(2, 8), head, torch.tensor([0, 3]))
        >>> losses  # log(4) each
        tensor([1.3863, 1.3863])
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
    """The loss and the columns of the rows of one matrix product, by name."""
    target_logits = _target_logits(hidden, head, targets)
    # A GPU takes the tally at once: the host would have to wait for the odds to see them finite.
    on_cpu = hidden.device.type == "cpu"
    if not columns and head.kernel != "triton" and on_cpu:
        odds = _odds(hidden, head, targets, target_logits)
        if odds.isfinite().all():
            return {"loss": odds.log1p()}
    tally = _tally(hidden, head, targets, columns=bool(columns))
    # All other classes together count like one class whose logit is this far above the target's.
    gap = tally.top + tally.total.log() - target_logits
    values = {"loss": F.softplus(gap)}
    rest = gap.sigmoid()  # the probability of all other classes together, 1 − p(target)
    if "entropy" in columns:
        # The chain rule of entropy: first whether the target comes or another class, and then, if
        # another one, which of them.
        entropy_of_rest = tally.total.log() - tally.first / tally.total
        values["entropy"] = (
            torch.special.entr(rest) + (-gap).sigmoid() * values["loss"] + rest * entropy_of_rest
        )
    if "correct" in columns:
        values["correct"] = (target_logits > tally.top).float()
    if "gradient_norm" in columns:
        # The gradient in the logits is (p − onehot) · slope. At the target this is −(1 − p(target))
        # · slope, at another class (1 − p(target)) · exp(z − top) / total · slope. Both have the
        # factor 1 − p(target), which is therefore a factor of the norm.
        slope = _slope(target_logits, head.softcap)
        norm = (tally.squares / tally.total.square() + slope * slope).sqrt() * rest
        values["gradient_norm"] = norm * head.scale * hidden.float().norm(dim=1)
    return values


def _target_logits(hidden: Tensor, head: Head, targets: Tensor) -> Tensor:
    # These dot products are made anew in float32. In the low-precision ones a target's logit is
    # rounded, and the loss, a small difference of large logits, would have all of that error.
    dots = (hidden.float() * head.weight[targets].float()).sum(1)
    bias = None if head.bias is None else head.bias[targets]
    return finish_logits(dots, bias, head.scale, head.softcap)


def _odds(hidden: Tensor, head: Head, targets: Tensor, target_logits: Tensor) -> Tensor:
    """Return (1 − p) / p of every target: Σ exp(z − z of the target) over all other classes.

    `_add_tally` subtracts the running maximum from the logits; here the target's logit takes its
    place, which spares a pass over each tile. The sum overflows float32 only where a loss is above
    88 nats; the caller then falls back on the tally.
    """
    odds = torch.zeros_like(target_logits)
    for rows, products, bias, buffer in tiles(hidden, head, targets):
        share = odds_of_tile if head.kernel == "eager" else one_pass(odds_of_tile)
        odds[rows] += share(products, buffer, bias, head.scale, head.softcap, target_logits[rows])
    return odds


def odds_of_tile(
    products: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
    target_logits: Tensor,
) -> Tensor:
    """Return a tile's share of the odds, (rows,) float32: Σ exp(z − z of the target).

    Args:
        products: (rows, classes) of hidden states and the head's weights.
        buffer: float32 memory for the logits, or None.
        bias: (classes,), or None.
        scale: see `finish_logits`.
        softcap: see `finish_logits`.
        target_logits: (rows,) float32.
    """
    logits = _logits(products, buffer, bias, scale, softcap)
    return logits.sub_(target_logits[:, None]).exp_().sum(1)


def _tally(hidden: Tensor, head: Head, targets: Tensor, *, columns: bool) -> Tally:
    """The sums over all classes but the targets; the last two may be 0 if `columns` is False."""
    if head.kernel == "triton":
        from flowdata.head.triton import partial_sums

        parts = partial_sums(
            hidden, head.weight, head.bias, targets, head.scale, head.softcap, columns=columns
        )
        return merge(Tally(*parts))
    sums = torch.zeros(4, len(hidden), device=hidden.device, dtype=torch.float32)
    sums[0] = LOWEST
    for rows, products, bias, buffer in tiles(hidden, head, targets):
        add = _add_tally if head.kernel == "eager" else one_pass(_add_tally)
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
    """The tally of rows after a tile, from the tally before it."""
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


def _logits(
    products: Tensor,
    buffer: Tensor | None,
    bias: Tensor | None,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """The float32 logits of a tile, written into the buffer if there is one."""
    if buffer is None:
        logits = products.to(torch.float32, copy=True)
    else:
        logits = buffer[: products.numel()].view(products.shape).copy_(products)
    finish_logits(logits, bias, scale, softcap)
    # The softcap would turn a target's −inf into −softcap, which counts as a class again.
    return logits if softcap is None else logits.masked_fill_(products == -torch.inf, LOWEST)


def _slope(logits: Tensor, softcap: float | None) -> Tensor | float:
    """The derivative of the logits in what they are without the softcap: 1 if there is none."""
    return 1.0 if softcap is None else softcap_slopes(logits, softcap)
