"""The head on a GPU: a Triton kernel that adds logits up without writing them to memory.

A program takes a block of rows and a range of the vocabulary. It multiplies one slice of classes
after another and folds each into the four sums of its rows, all in registers. The caller merges
the sums of all ranges (tally.py). Import this file only where Triton is installed.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowdata.head.tally import LOWEST

# A program's tile has 128 rows and 128 classes, 64 KiB of float32 in registers, and is made from 64
# dimensions of the inputs at a time: 32 KiB in bfloat16, of which shared memory holds three stages.
_ROWS, _CLASSES, _DEPTH = 128, 128, 64
# The least number of programs: it keeps every multiprocessor busy (an H100 has 132) when rows are
# few. Nothing here was tuned by measurements yet.
_PROGRAMS = 512


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
    # Many ranges only where blocks of rows alone are too few; each is of whole slices of classes.
    blocks = triton.cdiv(n, _ROWS)
    ranges = max(1, min(triton.cdiv(_PROGRAMS, max(1, blocks)), triton.cdiv(vocabulary, _CLASSES)))
    span = triton.cdiv(triton.cdiv(vocabulary, ranges), _CLASSES) * _CLASSES
    ranges = triton.cdiv(vocabulary, span)
    sums = torch.zeros(4, ranges, n, device=hidden.device)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if n:
        _tally[(blocks, ranges)](
            hidden,
            weight,
            weight if bias is None else bias.contiguous(),  # any tensor stands for no bias
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
            CLASSES=_CLASSES,
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
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write four sums of one block of rows over one range of the vocabulary (tally.py).

    Each sum goes to its place in `sums`, (4, ranges, n).
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    first_class = tl.program_id(1) * span
    target = tl.load(targets + rows, mask=is_row, other=-1)
    row_starts = hidden + rows.to(tl.int64)[:, None] * width
    top = tl.full((ROWS,), LOWEST, tl.float32)
    total = tl.zeros((ROWS,), tl.float32)
    first = tl.zeros((ROWS,), tl.float32)
    squares = tl.zeros((ROWS,), tl.float32)
    for start in range(first_class, tl.minimum(first_class + span, vocabulary), CLASSES):
        classes = start + tl.arange(0, CLASSES)
        is_class = classes < vocabulary
        class_starts = weight + classes.to(tl.int64)[None, :] * width
        # A tile of logits z, added up over the hidden dimensions and never written to memory.
        z = tl.zeros((ROWS, CLASSES), tl.float32)
        for depth in range(0, width, DEPTH):
            d = depth + tl.arange(0, DEPTH)
            h = tl.load(
                row_starts + d[None, :], mask=is_row[:, None] & (d < width)[None, :], other=0
            )
            w = tl.load(
                class_starts + d[:, None], mask=is_class[None, :] & (d < width)[:, None], other=0
            )
            z = tl.dot(h, w, z, input_precision=PRECISION)
        if HAS_BIAS:
            z += tl.load(bias + classes, mask=is_class, other=0).to(tl.float32)[None, :]
        z *= scale
        if HAS_SOFTCAP:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap · tanh(z / softcap)
        slope = z / softcap if HAS_SOFTCAP else tl.zeros_like(z)
        # Neither the row's target nor what lies beyond the vocabulary counts.
        z = tl.where(is_class[None, :] & (classes[None, :] != target[:, None]), z, LOWEST)
        # The online log-sum-exp, as in tiled.py's `_add_tally`.
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
