"""The losses of a training batch and their gradients, one tile of logits after another.

::

                     vocabulary →
                  ┌────────────────┐  products = hidden[rows] · weightᵀ
         rows  ↓  │ tile           │    products → logits → losses[rows]
                  │                │    logits → slopes, by which the total changes with products
                  ├────────────────┤      slopes  · weight       is    d_hidden[rows]
                  │ next tile      │      slopesᵀ · hidden[rows] is added to d_weight
                  │       …        │      Σ slopes over the rows is added to d_bias
                  └────────────────┘

Matrix products take the dtype of the hidden states, as the plain head's do. Everything between them
is float32 (float64 for float64): logits, losses, slopes, and the sums over tiles. A sum of many
tiles in bfloat16 would lose every part smaller than a 256th of it.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from flowdata.head.output_layer import Head, finish_logits, softcap_slopes

# Logits in a tile: 128 MiB in float32, which are 128 rows at a vocabulary of 256k. They bound the
# memory that training needs beside the gradients.
_LOGITS_OF_A_TILE = 1 << 25
# The fewest rows of a tile, whatever the vocabulary. Each tile reads and writes the weight's whole
# gradient once, which takes too much of the time if it has few rows.
_FEWEST_ROWS = 64
# Classes of the weight's gradient that are made in low precision, and added up in float32, at a
# time: 32 MiB in bfloat16 at a width of 2,048.
_CLASSES_AT_ONCE = 8192


def losses_and_gradients(
    hidden: Tensor, head: Head, targets: Tensor, coefficients: Tensor, needs: Sequence[bool]
) -> tuple[Tensor, list[Tensor | None]]:
    """Return the losses of rows, and the gradients of Σ coefficient · loss.

    Args:
        hidden: (n, d) floating.
        head: its weight has the dtype of `hidden`.
        targets: (n,) int64 in [0, V).
        coefficients: (n,) floating.
        needs: whether hidden states, weight and bias need their gradients.

    Returns:
        (n,) float32 losses in nats, float64 for float64 hidden states, and the gradients of hidden
        states, weight and bias, None where not needed.
    """
    exact = torch.promote_types(hidden.dtype, torch.float32)
    gradients = _Gradients.begin(hidden, head, needs, exact)
    losses = torch.empty(len(hidden), dtype=exact, device=hidden.device)
    # Two buffers serve all tiles: one for products, in the inputs' dtype, and one for their float32
    # values. Where the inputs are float32 themselves, one buffer is both.
    count = min(len(hidden), rows_of_a_tile(head.weight))
    products = hidden.new_empty(count, len(head.weight))
    values = products if hidden.dtype == exact else torch.empty_like(products, dtype=exact)
    for start in range(0, len(hidden), max(1, count)):
        rows = slice(start, start + count)
        target, factors = targets[rows, None], coefficients[rows, None].to(exact) * head.scale
        product, value = products[: len(target)], values[: len(target)]
        torch.mm(hidden[rows], head.weight.t(), out=product)
        _copy(product, value)
        finish_logits(value, head.bias, head.scale, head.softcap)
        cap_slopes = None if head.softcap is None else softcap_slopes(value, head.softcap)
        losses[rows], sums = _losses_in_place(value, target)
        if any(needs):
            # The slope of coefficient · loss in a product is, with factor = coefficient · scale,
            # factor · (softmax − onehot(target)), times the slope of the softcap.
            value.mul_(factors / sums).scatter_add_(1, target, -factors)
            if cap_slopes is not None:
                value.mul_(cap_slopes)
            _copy(value, product)
            gradients.add(rows, product, value, hidden[rows], head.weight)
    return losses, [gradients.hidden, gradients.weight, gradients.bias]


def _losses_in_place(logits: Tensor, target: Tensor) -> tuple[Tensor, Tensor]:
    """The losses of a tile's rows, (rows,), and Σ exp(z − top), (rows, 1).

    The logits z become exp(z − top) in place. The largest logit of each row, top, is subtracted so
    that nothing overflows. A loss is log Σ exp(z − top) + top − the target's z.
    """
    top, target_logits = logits.amax(1, keepdim=True), logits.gather(1, target)
    sums = logits.sub_(top).exp_().sum(1, keepdim=True)
    return (sums.log() + (top - target_logits)).squeeze(1), sums


@dataclass
class _Gradients:
    """The gradients of Σ coefficient · loss, summed over the tiles so far; None if not needed.

    Attributes:
        hidden: (n, d) in the dtype of the hidden states: a row's gradient comes from one tile.
        weight: (V, d) float32 (or float64), a sum over all tiles.
        bias: (V,) float32 (or float64), a sum over all tiles.
    """

    hidden: Tensor | None
    weight: Tensor | None
    bias: Tensor | None

    @classmethod
    def begin(
        cls, hidden: Tensor, head: Head, needs: Sequence[bool], dtype: torch.dtype
    ) -> _Gradients:
        """Return the gradients before the first tile."""
        weight, bias = head.weight, head.bias
        return cls(
            torch.empty_like(hidden) if needs[0] else None,
            torch.zeros_like(weight, dtype=dtype) if needs[1] else None,
            torch.zeros_like(bias, dtype=dtype) if bias is not None and needs[2] else None,
        )

    def add(
        self, rows: slice, product: Tensor, value: Tensor, hidden: Tensor, weight: Tensor
    ) -> None:
        """Add a tile's part.

        Args:
            rows: the tile's rows.
            product: the tile's slopes in the inputs' dtype, for matrix products.
            value: the same slopes in float32, for the bias.
            hidden: the hidden states of the tile's rows.
            weight: the head's weight.
        """
        if self.hidden is not None:
            torch.mm(product, weight, out=self.hidden[rows])
        if self.weight is not None:
            _add_product(self.weight, product, hidden)
        if self.bias is not None:
            self.bias += value.sum(0)


def _add_product(total: Tensor, slopes: Tensor, hidden: Tensor) -> None:
    """Add slopesᵀ · hidden to the total, in the total's dtype."""
    if slopes.dtype == total.dtype:
        total.addmm_(slopes.t(), hidden)
        return
    # `addmm_` takes one dtype, so the low-precision product is made by itself, some classes at a
    # time, and added in float32.
    for start in range(0, len(total), _CLASSES_AT_ONCE):
        classes = slice(start, start + _CLASSES_AT_ONCE)
        total[classes] += slopes[:, classes].t() @ hidden


def _copy(source: Tensor, destination: Tensor) -> None:
    """Copy a tile from one buffer to the other, unless the two are the same memory."""
    if source.dtype != destination.dtype:
        destination.copy_(source)


def rows_of_a_tile(weight: Tensor | None) -> int:
    """Return how many rows a tile has: the fewest if there is no (V, d) weight to tell V."""
    if weight is None or weight.dim() != 2:
        return _FEWEST_ROWS
    return max(_FEWEST_ROWS, _LOGITS_OF_A_TILE // len(weight))
