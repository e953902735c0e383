"""The head on a GPU: a Triton kernel that adds logits up without writing them to memory.

A program takes a block of rows and a range of the vocabulary. It multiplies one slice of classes
after another and folds each into the four sums of its rows, all in registers. The caller merges
the sums of all ranges (tally.py). Import this file only where Triton is installed.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor
from triton.tools.tensor_descriptor import TensorDescriptor

from flowdata.head.tally import LOWEST

# The least number of programs: it keeps every multiprocessor busy (an H100 has 132) when rows are
# few.
_PROGRAMS = 512


class Shape(NamedTuple):
    """The shape of a program's tile, and how it is made.

    Attributes:
        rows, classes: of the tile, whose float32 logits lie in registers.
        depth: dimensions of the inputs that one step multiplies; shared memory holds `stages` steps
            of (rows + classes) × depth inputs.
        warps: that share the tile.
        stages: steps whose inputs are under way at once.
        descriptors: whether the copy engine brings the inputs (compute capability 9 and up).
    """

    rows: int
    classes: int
    depth: int
    warps: int
    stages: int
    descriptors: bool = False


# Measured on an H200 in bfloat16, 8,192 rows, a width of 2,048 and 128k classes: the product alone
# runs at 751 TFLOP/s; the kernel with loads of its own at 457 with 128 classes and 531 with 256,
# and at 712 once the copy engine brings them. The columns' sums need registers of their own.
HOPPER = Shape(128, 256, 64, 8, 3, descriptors=True)
HOPPER_COLUMNS = Shape(128, 128, 128, 8, 2, descriptors=True)
# Not measured yet: chosen by the registers and the shared memory that the compiler reports
# (tests/test_triton_builds.py). Float32 inputs are multiplied in full precision.
BLACKWELL = Shape(128, 128, 64, 8, 3, descriptors=True)
OTHERS = Shape(128, 128, 64, 8, 3)
UNALIGNED = Shape(64, 128, 64, 8, 3)  # inputs come one by one, whose addresses need registers
FLOAT32 = Shape(64, 64, 16, 4, 3)


def partial_sums(
    hidden: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    targets: Tensor,
    scale: float,
    softcap: float | None,
    *,
    columns: bool = True,
    shape: Shape | None = None,
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
        columns: whether the last two sums are needed, those of the columns; else they stay 0.
        shape: of a program's tile; None takes what was measured to be fast.
    """
    n, width = hidden.shape
    vocabulary = len(weight)
    hidden, weight = hidden.contiguous(), weight.contiguous()
    if shape is None:
        major, _ = torch.cuda.get_device_capability(hidden.device) if hidden.is_cuda else (0, 0)
        is_aligned = _is_aligned(hidden) and _is_aligned(weight)
        shape = shape_for(hidden.dtype, major, is_aligned=is_aligned, columns=columns)
    # Many ranges only where blocks of rows alone are too few; each is of whole slices of classes.
    blocks, slices = triton.cdiv(n, shape.rows), triton.cdiv(vocabulary, shape.classes)
    ranges = max(1, min(triton.cdiv(_PROGRAMS, max(1, blocks)), slices))
    span = triton.cdiv(slices, ranges) * shape.classes
    ranges = triton.cdiv(vocabulary, span)
    sums = torch.zeros(4, ranges, n, device=hidden.device, dtype=torch.float32)
    if n:
        left, right = hidden, weight
        if shape.descriptors:
            left = TensorDescriptor.from_tensor(hidden, [shape.rows, shape.depth])
            right = TensorDescriptor.from_tensor(weight, [shape.classes, shape.depth])
        _tally[(blocks, ranges)](
            left,
            right,
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
            HAS_COLUMNS=columns,
            HAS_DESCRIPTORS=shape.descriptors,
            LOWEST=LOWEST,
            PRECISION="ieee" if hidden.dtype == torch.float32 else "tf32",
            ROWS=shape.rows,
            CLASSES=shape.classes,
            DEPTH=shape.depth,
            num_warps=shape.warps,
            num_stages=shape.stages,
        )
    return sums


def shape_for(dtype: torch.dtype, major: int, *, is_aligned: bool, columns: bool) -> Shape:
    """Return the shape of tiles for a kind of GPU.

    Args:
        dtype: of hidden states and weight.
        major: the first number of the GPU's compute capability.
        is_aligned: whether the copy engine can take both.
        columns: whether the columns' sums are made as well.
    """
    if dtype == torch.float32:
        return FLOAT32
    if not is_aligned:
        return UNALIGNED
    if major not in (9, 10):  # 12, of workstations, has too little shared memory
        return OTHERS
    if major == 10:
        return BLACKWELL
    return HOPPER_COLUMNS if columns else HOPPER


def _is_aligned(matrix: Tensor) -> bool:
    """Whether the copy engine can take a matrix: its rows begin at multiples of 16 bytes."""
    row_bytes = matrix.shape[1] * matrix.element_size()
    return row_bytes % 16 == 0 and matrix.data_ptr() % 16 == 0


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
    HAS_COLUMNS: tl.constexpr,
    HAS_DESCRIPTORS: tl.constexpr,
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
    top = tl.full((ROWS,), LOWEST, tl.float32)
    zeros = tl.zeros((ROWS,), tl.float32)
    total, first, squares = zeros, zeros, zeros
    for start in range(first_class, tl.minimum(first_class + span, vocabulary), CLASSES):
        classes = start + tl.arange(0, CLASSES)
        is_class = classes < vocabulary
        z = products(
            hidden,
            weight,
            n,
            width,
            vocabulary,
            start,
            HAS_DESCRIPTORS,
            PRECISION,
            ROWS,
            CLASSES,
            DEPTH,
        )
        if HAS_BIAS:
            z += tl.load(bias + classes, mask=is_class, other=0).to(tl.float32)[None, :]
        z *= scale
        if HAS_SOFTCAP:
            z = softcap * (2 * tl.sigmoid(2 * z / softcap) - 1)  # softcap · tanh(z / softcap)
        if HAS_COLUMNS:
            slope = 1 - z * z / (softcap * softcap) if HAS_SOFTCAP else tl.full(z.shape, 1, z.dtype)
        # Neither the row's target nor what lies beyond the vocabulary counts.
        z = tl.where(is_class[None, :] & (classes[None, :] != target[:, None]), z, LOWEST)
        # The online log-sum-exp, as in tiled.py's `_add_tally`.
        new_top = tl.maximum(top, tl.max(z, 1))
        shift = top - new_top
        factor = tl.exp(shift)
        shifted = tl.maximum(z, LOWEST) - new_top[:, None]
        e = tl.exp(shifted)
        if HAS_COLUMNS:
            first = factor * (first + shift * total) + tl.sum(e * shifted, 1)
            squares = factor * factor * squares + tl.sum(e * e * slope * slope, 1)
        total = factor * total + tl.sum(e, 1)
        top = new_top
    part = sums + tl.program_id(1).to(tl.int64) * n + rows
    step = tl.num_programs(1).to(tl.int64) * n
    tl.store(part, top, mask=is_row)
    tl.store(part + step, total, mask=is_row)
    if HAS_COLUMNS:
        tl.store(part + 2 * step, first, mask=is_row)
        tl.store(part + 3 * step, squares, mask=is_row)


@triton.jit  # type: ignore[untyped-decorator]
def products(  # type: ignore[no-untyped-def]
    hidden,
    weight,
    n,
    width,
    vocabulary,
    start,
    HAS_DESCRIPTORS: tl.constexpr,
    PRECISION: tl.constexpr,
    ROWS: tl.constexpr,
    CLASSES: tl.constexpr,
    DEPTH: tl.constexpr,
):
    """A tile of hidden · weightᵀ, (ROWS, CLASSES) in registers, for the classes from `start` on."""
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    classes = start + tl.arange(0, CLASSES)
    z = tl.zeros((ROWS, CLASSES), tl.float32)
    for depth in range(0, width, DEPTH):
        if HAS_DESCRIPTORS:  # what lies beyond their ends reads as 0
            h = hidden.load([tl.program_id(0) * ROWS, depth])
            w = weight.load([start, depth])
        else:
            d = depth + tl.arange(0, DEPTH)
            is_dimension = (d < width)[None, :]
            places = rows.to(tl.int64)[:, None] * width + d[None, :]
            h = tl.load(hidden + places, mask=(rows < n)[:, None] & is_dimension, other=0)
            places = classes.to(tl.int64)[:, None] * width + d[None, :]
            w = tl.load(
                weight + places, mask=(classes < vocabulary)[:, None] & is_dimension, other=0
            )
        z = tl.dot(h, w.T, z, input_precision=PRECISION)
    return z
