"""Tiles: products of hidden states with slices of the vocabulary, in memory that is used again.

One matrix product takes all rows and one slice of the vocabulary. Its result is read in tiles::

                   vocabulary, in slices →
                 ┌────────────┬────────────┬────────┐
        rows  ↓  │ tile ──────┼─→ buffer   │        │    products: the inputs' dtype, one slice
                 ├ ─ ─ ─ ─ ─ ─┤            │        │    buffer: float32, one tile
                 │ tile       │ next slice │   …    │
                 ├ ─ ─ ─ ─ ─ ─┤            │        │    both are written over and over, so that
                 │ tile       │            │        │    memory does not grow with the vocabulary
                 └────────────┴────────────┴────────┘
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import NamedTuple

import torch
from torch import Tensor

from flowdata.head.output_layer import Head

# Rows of an eager tile for each thread: with 2,048 classes in float32 half a MiB, which fits the
# second-level cache of the CPUs measured (1 MiB on AMD EPYC, 2 MiB on Intel with AMX).
ROWS_OF_A_CORE = 64


class Tile(NamedTuple):
    """The products of some rows with one slice of the vocabulary.

    Attributes:
        rows: the tile's rows among all.
        products: (rows, classes) hidden · weightᵀ, −inf at a row's own target.
        bias: (classes,) the bias of the slice, or None.
        buffer: flat float32 memory for the tile's logits; None where a compiled pass needs none.
    """

    rows: slice
    products: Tensor
    bias: Tensor | None
    buffer: Tensor | None


def tile_size(hidden: Tensor) -> tuple[int, int]:
    """Return how many rows and classes one matrix product has at most.

    On a CPU the result is 4 MiB in bfloat16: large enough for a product to run at its full rate,
    small enough for the last-level cache (measured on two cores of an Intel Xeon with AMX). On a
    GPU it is 128 MiB in float32. A GPU uses tiles only where Triton is missing: at 8,192 rows and
    128k classes an H200 takes 5 times as long for them as for the product alone, and 1.15 times as
    long for the Triton kernel.
    """
    return (4096, 8192) if hidden.is_cuda else (1024, 2048)


def tiles(hidden: Tensor, head: Head, targets: Tensor) -> Iterator[Tile]:
    """Yield the tiles of all classes but each row's target, slice after slice.

    The next tile overwrites the one before. A compiled pass reads a tile once, so its tiles have
    all rows. An eager one makes several passes over its buffer, so its tiles are small enough to
    stay in a core's cache.

    Args:
        hidden: (n, d) floating, at most the rows of `tile_size`.
        head: its weight has the dtype of `hidden`.
        targets: (n,) int64 in [0, V).
    """
    n, (_, width) = len(hidden), tile_size(hidden)
    step = _rows_of_a_tile(hidden, head)
    buffer = (
        torch.empty(step * width, device=hidden.device, dtype=torch.float32)
        if head.kernel == "eager"
        else None
    )
    memory = hidden.new_empty(n * width, dtype=_product_dtype(hidden))
    for start in range(0, len(head.weight), width):
        weight = head.weight[start : start + width]
        bias = None if head.bias is None else head.bias[start : start + width]
        products = memory[: n * len(weight)].view(n, len(weight))
        _multiply(hidden, weight, out=products)
        _rule_out(products, targets - start)
        for first in range(0, n, step):
            rows = slice(first, first + step)
            yield Tile(rows, products[rows], bias, buffer)


def _rows_of_a_tile(hidden: Tensor, head: Head) -> int:
    makes_passes = head.kernel == "eager" and not hidden.is_cuda
    rows = ROWS_OF_A_CORE * torch.get_num_threads() if makes_passes else len(hidden)
    return max(1, min(rows, len(hidden)))


def _rule_out(products: Tensor, targets: Tensor) -> None:
    """Set the product of each row with its target to −inf, where the slice has the target.

    The sums are over the other classes, and exp(−inf) adds nothing to them. A row whose target lies
    in another slice writes back a value that it already has. To leave such rows out, the host would
    have to wait for the device to learn which they are.
    """
    inside = (targets >= 0) & (targets < products.shape[1])
    rows = torch.arange(len(products), device=products.device)
    places = rows, targets.clamp(0, products.shape[1] - 1)
    products.index_put_(places, products[places].masked_fill_(inside, -torch.inf))


def _product_dtype(hidden: Tensor) -> torch.dtype:
    """The dtype of products: a GPU can write float32 products of bfloat16 inputs, a CPU can't."""
    return torch.float32 if hidden.is_cuda else hidden.dtype


def _multiply(hidden: Tensor, weight: Tensor, out: Tensor) -> None:
    if out.dtype == hidden.dtype:
        torch.mm(hidden, weight.t(), out=out)
    else:
        torch.mm(hidden, weight.t(), out_dtype=out.dtype, out=out)
