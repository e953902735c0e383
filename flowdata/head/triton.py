"""The head on a GPU: a Triton kernel that adds logits up without writing them to memory.

A program takes a block of rows and a range of the vocabulary. It multiplies one slice of classes
after another and folds each into the four sums of its rows, all in registers. The caller merges
the sums of all ranges (`output_layer.merge`). Import this file only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowdata.head.output_layer import LOWEST

_ROWS, _COLUMNS, _DEPTH = 128, 128, 64  # of a program's tile; shared memory holds three of them
_PROGRAMS = 512  # at least so many, to keep every multiprocessor busy when rows are few


def partial_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
) -> Tensor:
    """Return the four sums of a `Tally` for every range of the vocabulary, (4, ranges, n) float32.

    The grid of programs, each with its tile of logits in registers::

                     vocabulary, in ranges of `span` classes
                   ┌──────────────┬──────────────┬─────────┐
        rows 0…127 │ program 0, 0 │ program 0, 1 │   …     │
                   ├──────────────┼──────────────┼─────────┤
      rows 128…255 │ program 1, 0 │   …          │         │
                   └──────────────┴──────────────┴─────────┘

    Args:
        hidden: (n, d) floating, on a GPU.
        weight: (V, d) in the dtype of `hidden`.
        bias: (V,) floating, or None.
        targets: (n,) int64 in [0, V).
        scale: factor on the logits.
        softcap: their bound, or None.
    """
    n, width = hidden.shape
    vocabulary = len(weight)
    blocks = triton.cdiv(n, _ROWS)
    ranges = max(1, min(triton.cdiv(_PROGRAMS, max(1, blocks)), triton.cdiv(vocabulary, _COLUMNS)))
    span = triton.cdiv(triton.cdiv(vocabulary, ranges), _COLUMNS) * _COLUMNS
    ranges = triton.cdiv(vocabulary, span)
    sums = torch.zeros(4, ranges, n, device=hidden.device)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if n:
        _tally[(blocks, ranges)](
            hidden,
            weight,
            weight if bias is None else bias.contiguous(),
            targets,
            sums,
            n,
            width,
            vocabulary,
            span,
            scale,
            1.0 if softcap is None else softcap,
            HAS_BIAS=bias is not None,
            HAS_SOFTCAP=softcap is not None,
            LOWEST=LOWEST,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
            ROWS=_ROWS,
            COLUMNS=_COLUMNS,
            DEPTH=_DEPTH,
            num_warps=8,
            num_stages=3,
        )
    return sums


@triton.jit  # type: ignore[untyped-decorator]
def _tally(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    targets,
    sums,
    n,
    width,
    vocabulary,
    span,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    LOWEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    COLUMNS: tl.constexpr,
    DEPTH: tl.constexpr,
):
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    first_column = tl.program_id(1) * span
    target = tl.load(targets + rows, mask=is_row, other=-1)
    row_starts = hidden + rows.to(tl.int64)[:, None] * width
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(first_column, tl.minimum(first_column + span, vocabulary), COLUMNS):
        columns = start + tl.arange(0, COLUMNS)
        is_column = columns < vocabulary
        column_starts = weight + columns.to(tl.int64)[None, :] * width
        z = tl.zeros((ROWS, COLUMNS), tl.float32)
        for depth in range(0, width, DEPTH):
            d = depth + tl.arange(0, DEPTH)
            h = tl.load(
                row_starts + d[None, :], mask=is_row[:, None] & (d < width)[None, :], other=0
            )
            w = tl.load(
                column_starts + d[:, None], mask=is_column[None, :] & (d < width)[:, None], other=0
            )
            z = tl.dot(h, w, z, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + columns, mask=is_column, other=0).to(tl.float32)[None, :]
        z *= scale
        if HAS_SOFTCAP:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)
        slope = z / softcap if HAS_SOFTCAP else tl.zeros_like(z)
        z = tl.where(is_column[None, :] & (columns[None, :] != target[:, None]), z, LOWEST)
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = top - new_top
        factor = tl.exp(shift)
        shifted = tl.maximum(z, LOWEST) - new_top[:, None]
        e = tl.exp(shifted)
        slope = 1 - slope * slope
        first = factor * (first + shift * total) + tl.sum(e * shifted, 1)
        squares = factor * factor * squares + tl.sum(e * e * slope * slope, 1)
        total = factor * total + tl.sum(e, 1)
        top = new_top
    part = sums + tl.program_id(1).to(tl.int64) * n + rows
    step = tl.num_programs(1).to(tl.int64) * n
    tl.store(part, top, mask=is_row)
    tl.store(part + step, total, mask=is_row)
    tl.store(part + 2 * step, first, mask=is_row)
    tl.store(part + 3 * step, squares, mask=is_row)
