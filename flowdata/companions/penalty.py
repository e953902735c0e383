"""The sum of |θ − θ*|^order over parameters, and its gradient, without a second copy of the model.

A plain expression would keep the differences θ − θ* of all parameters from the forward to the
backward pass. Here both passes take them anew, some parameters at a time:

    parameters  θ₁ θ₂ θ₃ | θ₄ | θ₅ θ₆    a bucket holds about 64 MiB of differences
    starts      θ₁*θ₂*θ₃*| θ₄*| θ₅*θ₆*   beside the parameters, or on the CPU: then a bucket's
                                         part moves to the accelerator and is dropped again
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from functools import reduce
from typing import Any

import torch
from torch import Tensor

from flowdata.companions.sharding import whole

_BUCKET = 1 << 26  # bytes of differences in memory at a time


def distance(order: int, parameters: Sequence[Tensor], starts: list[Tensor]) -> Tensor:
    """Return Σ |θ − θ*|^order: 0-d, on the device of the first parameter.

    It has the widest dtype of the parameters, and float32 at least.

    Args:
        order: 1 or 2; 1 of real parameters alone.
        parameters: θ, each of which gets a gradient; DTensors count whole.
        starts: θ* of each, in its dtype and sharded as it is, on its device or the CPU.
    """
    # |z|² is the sum of the squares of both parts, and autograd puts their gradients together.
    parameters, starts = _as_real(parameters), _as_real(starts)
    penalty: Tensor = _Distance.apply(order, starts, *parameters)  # type: ignore[no-untyped-call]
    return penalty


class _Distance(torch.autograd.Function):
    """Σ |θ − θ*|^order over all parameters; saves the parameters, not the differences."""

    @staticmethod
    def forward(ctx: Any, order: int, starts: list[Tensor], *parameters: Tensor) -> Tensor:
        ctx.order, ctx.starts = order, starts
        ctx.save_for_backward(*parameters)
        dtypes = (parameter.dtype for parameter in parameters)
        dtype = reduce(torch.promote_types, dtypes, torch.float32)
        total = torch.zeros((), dtype=dtype, device=parameters[0].device)
        for differences in _differences(parameters, starts):
            # One kernel for a whole bucket: a loop over hundreds of small tensors would launch
            # hundreds. The norm to the power of the order is the sum, and no square is stored. The
            # norm of a shard becomes that of the whole tensor.
            norms = torch._foreach_norm(differences, order, dtype=dtype)
            total += torch.stack([whole(norm).to(total) for norm in norms]).pow(order).sum()
        return total

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, slope: Tensor) -> tuple[Tensor | None, ...]:
        gradients: list[Tensor] = []
        for differences in _differences(ctx.saved_tensors, ctx.starts):
            # d/dθ |θ − θ*| is the sign, d/dθ (θ − θ*)² twice the difference: the differences turn
            # into gradients where they lie.
            if ctx.order == 1:
                torch._foreach_sign_(differences)
            for difference in differences:
                shard = _shard(difference)
                shard.mul_(ctx.order * slope.to(shard))
            gradients += differences
        return None, None, *gradients


def _differences(parameters: Sequence[Tensor], starts: list[Tensor]) -> Iterator[list[Tensor]]:
    """θ − θ* of every parameter in turn, about `_BUCKET` bytes at a time.

    A bucket ends, too, where the mesh of ranks changes, or a sharded parameter follows a whole one:
    one kernel takes no mixture.
    """
    start = size = 0  # of the bucket: its first parameter, its bytes
    meshes = [getattr(parameter, "device_mesh", None) for parameter in parameters]
    for end, parameter in enumerate(parameters, start=1):
        size += _shard(parameter).nbytes
        if size < _BUCKET and end < len(parameters) and meshes[end] == meshes[end - 1]:
            continue
        current = [p.detach() for p in parameters[start:end]]
        anchors = [
            anchor.to(p.device, non_blocking=True)
            for anchor, p in zip(starts[start:end], current, strict=True)
        ]
        yield list(torch._foreach_sub(current, anchors))
        start, size = end, 0


def _as_real(tensors: Sequence[Tensor]) -> list[Tensor]:
    return [torch.view_as_real(each) if each.is_complex() else each for each in tensors]


def _shard(tensor: Tensor) -> Tensor:
    """The part of a tensor that this rank holds, which is all of it unless it is a DTensor."""
    return tensor.to_local() if hasattr(tensor, "to_local") else tensor
