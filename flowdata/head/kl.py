"""Divergences of two output layers' predictions, tile by tile: the logits never exist as a whole.

For every row there are two distributions over the classes, p = softmax(a) and q = softmax(b). A few
sums over the classes are all that is needed of each, and one tile after another is added to them::

                  classes, in slices →
               ┌──────────────┬───────
       rows ↓  │ tile of a    │  …        top a, Σ exp(a − top a), Σ exp(a − top a) · (a − b)
               │ tile of b    │  …        top b, Σ exp(b − top b), Σ exp(b − top b) · (b − a)
               ├──────────────┼───────
               │  …           │

    KL(p ‖ q) = Σ p (log p − log q) = Σ p (a − b) − (log Σ exp a − log Σ exp b)

Logits are products in float32, whatever the dtype of the hidden states, and the sums over tiles are
float64. Equal logits give equal sums, and so a divergence of exactly 0.

The two terms nearly cancel in rows that hardly differ, down to the rounding of float32. The tiles
of these rows are made again, for a sum in which nothing cancels, because no term is negative::

    t = log p − log q           KL(p ‖ q) = Σ p t + q − p = Σ p (t + exp(−t) − 1)
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.head.output_layer import Head, finish_logits
from flowdata.models.precision import without_autocast

# Rows and classes of a tile. On a CPU the three buffers of 2 MiB stay in the last-level cache.
_TILE = {"cpu": (512, 1024), "cuda": (4096, 4096)}
# Logits in the tile of a layer that has to be called, which makes those of all classes at once.
_CALLED_LOGITS = 1 << 22
_LARGEST = 1e30  # stands for an infinite difference of logits, so that 0 times it is 0
_INFINITE = 1e20  # divergences from here on are infinite
_NEAR = 1e-3  # nats, below which the rounding of a difference of sums would be seen
_SMALL = 0.25  # of t, up to which its series is exact in float32


class Divergences(NamedTuple):
    """How far apart the predictions of each row are.

    Attributes:
        kl: (n,) float64, KL(p ‖ q) in nats; inf where a logit is no number.
        reverse_kl: (n,) float64, KL(q ‖ p) in nats.
        agreement: (n,) float64, 1 where both have the same likeliest class, else 0.
    """

    kl: Tensor
    reverse_kl: Tensor
    agreement: Tensor


@dataclass(frozen=True)
class Predictions:
    """Rows, and the output layer that makes their logits.

    Attributes:
        rows: (n, d) floating, the layer's inputs.
        layer: a head that is read, or a module that has to be called.
    """

    rows: Tensor
    layer: Head | nn.Module


def logits_of(predictions: Predictions) -> Tensor:
    """Return the logits of a few rows, (n, V) float32."""
    rows, layer = predictions.rows, predictions.layer
    if isinstance(layer, nn.Module):
        logits: Tensor = layer(rows).float()
        return logits
    bias = None if layer.bias is None else layer.bias.float()
    with without_autocast(rows.device):
        products = rows.float() @ layer.weight.float().t()
        return finish_logits(products, bias, layer.scale, layer.softcap)


def divergences(base: Predictions, tuned: Predictions) -> Divergences:
    """Return how far apart two predictions are, row by row.

    Args:
        base: gives p.
        tuned: gives q, with as many rows and classes.

    Raises:
        ValueError: they have not as many classes.

    Example:
        >>> rows, head = torch.ones(3, 8), Head(torch.ones(50, 8))
        >>> divergences(Predictions(rows, head), Predictions(rows, head)).kl
        tensor([0., 0., 0.], dtype=torch.float64)
    """
    with torch.no_grad(), without_autocast(base.rows.device):
        p, q = Sums.of(base, tuned)
        values = divergences_of(p, q)
        near = (values.kl < _NEAR).nonzero().flatten()
        if len(near):
            one, other = (Predictions(each.rows[near], each.layer) for each in (base, tuned))
            log_sums = p.log_sum()[near], q.log_sum()[near]
            values.kl[near], values.reverse_kl[near] = _of_near(one, other, *log_sums)
        return values


@dataclass(frozen=True)
class Sums:
    """Sums over the classes so far, for every row.

    Attributes:
        top: (n,) float64, the largest logit z.
        total: (n,) float64, Σ exp(z − top).
        differences: (n,) float64, Σ exp(z − top) · difference to the other's logit.
        likeliest: (n,) int64, the first class with the largest logit.
    """

    top: Tensor
    total: Tensor
    differences: Tensor
    likeliest: Tensor

    @classmethod
    def of(cls, base: Predictions, tuned: Predictions) -> tuple[Sums, Sums]:
        """Return the sums of both predictions, those of p and those of q.

        Args:
            base: gives p.
            tuned: gives q, with as many rows and classes.

        Raises:
            ValueError: they have not as many classes.
        """
        if all(isinstance(e.layer, Head) and e.layer.kernel == "triton" for e in (base, tuned)):
            from flowdata.head.kl_triton import partial_sums

            _count_classes(base, tuned)
            sums, likeliest = partial_sums(base, tuned)
            return cls.merge(sums[:3], likeliest[0]), cls.merge(sums[3:], likeliest[1])
        count, device = len(base.rows), base.rows.device
        p, q = cls.begin(count, device), cls.begin(count, device)
        for tile in tiles(base, tuned):
            difference = _difference(tile)
            p.add(tile.rows, tile.a, difference, tile.first_class)
            q.add(tile.rows, tile.b, difference.neg_(), tile.first_class)
        return p, q

    @classmethod
    def begin(cls, count: int, device: torch.device) -> Sums:
        """Return the sums over no classes, to which `add` adds.

        Args:
            count: n, the number of rows.
            device: where the sums are.
        """
        total = torch.zeros(count, dtype=torch.float64, device=device)
        classes = torch.zeros(count, dtype=torch.long, device=device)
        return cls(torch.full_like(total, -_LARGEST), total, total.clone(), classes)

    @classmethod
    def merge(cls, sums: Tensor, likeliest: Tensor) -> Sums:
        """Return the sums over all classes from those over ranges of them.

        Args:
            sums: (3, ranges, n) float32: `top`, `total` and `differences`.
            likeliest: (ranges, n) int64.
        """
        tops, totals, differences = sums.double()
        top, place = tops.max(0)
        factors = (tops - top).exp()
        total, difference = (factors * totals).sum(0), (factors * differences).sum(0)
        return cls(top, total, difference, likeliest.gather(0, place[None])[0])

    def add(self, rows: slice, logits: Tensor, difference: Tensor, first_class: int) -> None:
        """Take a tile of logits into account; it is written over.

        Args:
            rows: the tile's rows among all.
            logits: (rows, classes) float32.
            difference: to the other's logits, (rows, classes) float32.
            first_class: the number of the tile's first class.
        """
        top, place = logits.max(1)
        is_higher = top > self.top[rows]
        self.likeliest[rows] = torch.where(is_higher, place + first_class, self.likeliest[rows])
        top = torch.where(is_higher, top, self.top[rows])
        # The online log-sum-exp (Milakov and Gimelshein, 2018), as in tiled.py.
        factor = (self.top[rows] - top).exp()
        weights = logits.sub_(top[:, None]).exp_()
        self.total[rows] = factor * self.total[rows] + weights.sum(1)
        self.differences[rows] = factor * self.differences[rows] + weights.mul_(difference).sum(1)
        self.top[rows] = top

    def log_sum(self) -> Tensor:
        """Return log Σ exp z, (n,) float64."""
        return self.top + self.total.log()

    def mean_difference(self) -> Tensor:
        """Return the mean difference under the distribution itself, (n,) float64."""
        return self.differences / self.total


def divergences_of(p: Sums, q: Sums) -> Divergences:
    """Return the divergences that the sums of two predictions give.

    Args:
        p: of the base, n rows.
        q: of the tuned.
    """
    gap = p.log_sum() - q.log_sum()
    kl = _finite_or_infinite(p.mean_difference() - gap)
    reverse_kl = _finite_or_infinite(q.mean_difference() + gap)
    agrees = (p.likeliest == q.likeliest) & kl.isfinite()
    return Divergences(kl, reverse_kl, agrees.double())


def _of_near(
    base: Predictions, tuned: Predictions, log_sum_p: Tensor, log_sum_q: Tensor
) -> tuple[Tensor, Tensor]:
    """Return KL(p ‖ q) and KL(q ‖ p) of rows that hardly differ, (n,) float64."""
    kl, reverse_kl = torch.zeros_like(log_sum_p), torch.zeros_like(log_sum_p)
    gap = (log_sum_p - log_sum_q).float()[:, None]
    log_sum_p, log_sum_q = log_sum_p.float()[:, None], log_sum_q.float()[:, None]
    for tile in tiles(base, tuned):
        rows = tile.rows
        difference = _difference(tile).sub_(gap[rows])
        p = tile.a.sub_(log_sum_p[rows]).exp_()
        q = tile.b.sub_(log_sum_q[rows]).exp_()
        kl[rows] += _terms(p, q, difference).sum(1)
        reverse_kl[rows] += _terms(q, p, difference.neg_()).sum(1)
    return _finite_or_infinite(kl), _finite_or_infinite(reverse_kl)


def _terms(p: Tensor, q: Tensor, t: Tensor) -> Tensor:
    """What each class adds to KL(p ‖ q), where t = log p − log q; never negative."""
    series = t.square() * p * (1 / 2 - t * (1 / 6 - t * (1 / 24 - t * (1 / 120 - t / 720))))
    return torch.where(t.abs() < _SMALL, series, p * t + (q - p))


def _finite_or_infinite(values: Tensor) -> Tensor:
    """Divergences, which only rounding makes negative; what is no number is infinitely far away."""
    return values.clamp_min(0.0).masked_fill(~(values < _INFINITE), torch.inf)


class Tile(NamedTuple):
    """The logits of some rows for a slice of the classes, (rows, classes) float32.

    Attributes:
        rows: the tile's rows among all.
        first_class: the number of the slice's first class.
        a, b: logits of both predictions.
        difference: memory for a − b.
    """

    rows: slice
    first_class: int
    a: Tensor
    b: Tensor
    difference: Tensor


def _difference(tile: Tile) -> Tensor:
    """Return a − b, in the tile's memory for it."""
    # Equal logits do not differ, not even those of −inf.
    is_equal = tile.a == tile.b
    difference = torch.sub(tile.a, tile.b, out=tile.difference).masked_fill_(is_equal, 0.0)
    return difference.clamp_(-_LARGEST, _LARGEST)


def tiles(base: Predictions, tuned: Predictions) -> Iterator[Tile]:
    """Yield all tiles, slice after slice. The next one overwrites the one before.

    On a CPU new memory for each would take longer to get than the tile to make.

    Args:
        base: gives a.
        tuned: gives b, with as many rows and classes.

    Raises:
        ValueError: they have not as many classes.
    """
    pair, count, device = (base, tuned), len(base.rows), base.rows.device
    classes = _count_classes(base, tuned)
    height, width = _TILE.get(device.type, _TILE["cuda"])
    if any(isinstance(each.layer, nn.Module) for each in pair):
        height, width = max(1, _CALLED_LOGITS // classes), classes
    height = min(height, max(1, count))
    memory = torch.empty(3, height * min(width, classes), device=device, dtype=torch.float32)
    for first_class in range(0, classes, width):
        span = slice(first_class, min(first_class + width, classes))
        write_a, write_b = (_writer(each, span) for each in pair)
        for start in range(0, count, height):
            rows = slice(start, min(start + height, count))
            shape = rows.stop - rows.start, span.stop - span.start
            a, b, difference = (each[: shape[0] * shape[1]].view(shape) for each in memory)
            write_a(rows, a)
            write_b(rows, b)
            yield Tile(rows, first_class, a, b, difference)


def _count_classes(base: Predictions, tuned: Predictions) -> int:
    """How many classes both have."""
    one, other = count_classes(base), count_classes(tuned)
    if one != other:
        raise ValueError(f"predictions of {one} and of {other} classes can't be compared")
    return one


def count_classes(predictions: Predictions) -> int:
    """Return how many classes predictions are of; a layer that has to be called runs on one row."""
    if isinstance(predictions.layer, Head):
        return len(predictions.layer.weight)
    return int(predictions.layer(predictions.rows[:1]).shape[-1])


def _writer(predictions: Predictions, span: slice) -> Callable[[slice, Tensor], Any]:
    """Return what writes the logits of some rows for a span of classes into memory."""
    rows, layer = predictions.rows, predictions.layer
    if isinstance(layer, nn.Module):
        return lambda places, out: out.copy_(layer(rows[places])[:, span])
    weight = layer.weight[span].float().t()
    bias = None if layer.bias is None else layer.bias[span].float()

    def write(places: slice, out: Tensor) -> None:
        torch.mm(rows[places].float(), weight, out=out)
        finish_logits(out, bias, layer.scale, layer.softcap)

    return write
