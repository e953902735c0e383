"""The sums of kl.py on a GPU: a Triton kernel that writes no logits to memory.

A program takes a block of rows and a range of the classes, as that of triton.py does, and makes the
tiles of both predictions side by side in registers. kl.py puts the sums of all ranges together.
Import this file only where Triton is installed.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
import triton
import triton.language as tl
from torch import Tensor

from flowdata.head.output_layer import Head
from flowdata.head.triton import products

if TYPE_CHECKING:
    from flowdata.head.kl import Predictions

# Rows and classes of both tiles, whose float32 logits lie in registers, and the depth of one step.
# Chosen by what the compiler reports (tests/test_triton_builds.py), not measured yet.
ROWS, CLASSES, DEPTH, WARPS, STAGES = 64, 128, 64, 8, 3
FLOAT32 = 32, 64, 16, 4, 3
_PROGRAMS = 512  # at least, so that every multiprocessor has work when rows are few
_LOWEST = -1e30


def partial_sums(base: Predictions, tuned: Predictions) -> tuple[Tensor, Tensor]:
    """Return the sums over every range of the classes.

    Args:
        base: gives a; its layer is a head.
        tuned: gives b, with as many rows and classes.

    Returns:
        (6, ranges, n) float32, the largest logit, Σ exp(z − top) and Σ exp(z − top) · difference of
        a, and those of b; and (2, ranges, n) int64, the classes with the largest logits.
    """
    one, other = _head(base), _head(tuned)
    n, device, classes = len(base.rows), base.rows.device, len(one.weight)
    is_exact = torch.float32 in (base.rows.dtype, tuned.rows.dtype)
    rows, width, depth, warps, stages = (
        FLOAT32 if is_exact else (ROWS, CLASSES, DEPTH, WARPS, STAGES)
    )
    blocks, slices = triton.cdiv(n, rows), triton.cdiv(classes, width)
    ranges = max(1, min(triton.cdiv(_PROGRAMS, max(1, blocks)), slices))
    span = triton.cdiv(slices, ranges) * width
    ranges = triton.cdiv(classes, span)
    sums = torch.zeros(6, ranges, n, device=device, dtype=torch.float32)
    likeliest = torch.zeros(2, ranges, n, dtype=torch.long, device=device)
    if n:
        arguments = [part for each in (base, tuned) for part in _inputs(each)]
        _divergences[(blocks, ranges)](
            *arguments,
            sums,
            likeliest,
            n,
            classes,
            span,
            HAS_BIAS_A=one.bias is not None,
            HAS_BIAS_B=other.bias is not None,
            HAS_SOFTCAP_A=one.softcap is not None,
            HAS_SOFTCAP_B=other.softcap is not None,
            LOWEST=_LOWEST,
            PRECISION="ieee" if is_exact else "tf32",
            ROWS=rows,
            CLASSES=width,
            DEPTH=depth,
            num_warps=warps,
            num_stages=stages,
        )
    return sums, likeliest


def _head(predictions: Predictions) -> Head:
    if not isinstance(predictions.layer, Head):
        raise TypeError("the kernel needs heads that are read, not layers that have to be called")
    return predictions.layer


def _inputs(predictions: Predictions) -> list[Tensor | int | float]:
    """What the kernel takes of one prediction: rows, weight, bias, width, scale, softcap."""
    head = _head(predictions)
    rows = predictions.rows.contiguous()
    weight = head.weight.to(rows.dtype).contiguous()
    bias = weight if head.bias is None else head.bias.contiguous()  # any tensor stands for none
    softcap = 1.0 if head.softcap is None else head.softcap
    return [rows, weight, bias, rows.shape[1], head.scale, softcap]


@triton.jit  # type: ignore[untyped-decorator]
def _divergences(  # type: ignore[no-untyped-def]
    rows_a,
    weight_a,
    bias_a,
    width_a,
    scale_a,
    softcap_a,
    rows_b,
    weight_b,
    bias_b,
    width_b,
    scale_b,
    softcap_b,
    sums,
    likeliest,
    n,
    vocabulary,
    span,
    HAS_BIAS_A: tl.constexpr,
    HAS_BIAS_B: tl.constexpr,
    HAS_SOFTCAP_A: tl.constexpr,
    HAS_SOFTCAP_B: tl.constexpr,
    LOWEST: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """Write the sums of one block of rows over one range of the classes."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    is_row = rows < n
    first_class = tl.program_id(1) * span
    zeros = tl.zeros((ROWS,), tl.float32)
    lowest = tl.full((ROWS,), LOWEST, tl.float32)
    top_a, total_a, sum_a, class_a = lowest, zeros, zeros, tl.zeros((ROWS,), tl.int32)
    top_b, total_b, sum_b, class_b = lowest, zeros, zeros, tl.zeros((ROWS,), tl.int32)
    for start in range(first_class, tl.minimum(first_class + span, vocabulary), CLASSES):
        a = _logits(
            rows_a, weight_a, bias_a, n, width_a, vocabulary, start, scale_a, softcap_a,
            HAS_BIAS_A, HAS_SOFTCAP_A, PRECISION, ROWS, CLASSES, DEPTH,
        )  # fmt: skip
        b = _logits(
            rows_b, weight_b, bias_b, n, width_b, vocabulary, start, scale_b, softcap_b,
            HAS_BIAS_B, HAS_SOFTCAP_B, PRECISION, ROWS, CLASSES, DEPTH,
        )  # fmt: skip
        # Equal logits do not differ, not even those of −inf.
        difference = tl.where(a == b, 0.0, a - b)
        difference = tl.minimum(tl.maximum(difference, LOWEST), -LOWEST)
        top_a, total_a, sum_a, class_a = _add(a, difference, start, top_a, total_a, sum_a, class_a)
        top_b, total_b, sum_b, class_b = _add(b, -difference, start, top_b, total_b, sum_b, class_b)
    part = tl.program_id(1).to(tl.int64) * n + rows
    step = tl.num_programs(1).to(tl.int64) * n
    tl.store(sums + part, top_a, mask=is_row)
    tl.store(sums + part + step, total_a, mask=is_row)
    tl.store(sums + part + 2 * step, sum_a, mask=is_row)
    tl.store(sums + part + 3 * step, top_b, mask=is_row)
    tl.store(sums + part + 4 * step, total_b, mask=is_row)
    tl.store(sums + part + 5 * step, sum_b, mask=is_row)
    tl.store(likeliest + part, class_a.to(tl.int64), mask=is_row)
    tl.store(likeliest + part + step, class_b.to(tl.int64), mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def _logits(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    bias,
    n,
    width,
    vocabulary,
    start,
    scale,
    softcap,
    HAS_BIAS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of logits, (ROWS, CLASSES) in registers; −inf beyond the last class."""
    z = products(
        hidden, weight, n, width, vocabulary, start, False, PRECISION, ROWS, CLASSES, DEPTH
    )
    classes = start + tl.arange(0, CLASSES)
    is_class = classes < vocabulary
    if HAS_BIAS:
        z += tl.load(bias + classes, mask=is_class, other=0).to(tl.float32)[None, :]
    z *= scale
    if HAS_SOFTCAP:
        z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap · tanh(z / softcap)
    return tl.where(is_class[None, :], z, -float("inf"))


@triton.jit
def _add(z, difference, start, top, total, summed, likeliest):  # type: ignore[no-untyped-def]
    """The sums of rows after a tile, from those before it."""
    tile_top, place = tl.max(z, 1, return_indices=True)
    likeliest = tl.where(tile_top > top, place + start, likeliest)
    new_top = tl.maximum(top, tile_top)
    factor = tl.exp(top - new_top)
    e = tl.exp(z - new_top[:, None])
    summed = factor * summed + tl.sum(e * difference, 1)
    total = factor * total + tl.sum(e, 1)
    return new_top, total, summed, likeliest
