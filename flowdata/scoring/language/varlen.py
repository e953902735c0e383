"""Variable-length attention on a GPU: PyTorch's own flash kernel over samples laid end to end."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.models.tensors import to_device


def has_varlen(query: Tensor) -> bool:
    """Return whether PyTorch's kernel takes such queries: half precision, compute capability 8."""
    return (
        query.is_cuda
        and query.dtype in (torch.bfloat16, torch.float16)
        and query.shape[-1] % 8 == 0
        and query.shape[-1] <= 256
        and torch.cuda.get_device_capability(query.device) >= (8, 0)
    )


def varlen(
    blocks: Sequence[tuple[int, int, int | None]],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: tuple[Tensor, Tensor] | None,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Return the causal attention of all samples in one call, (T, H, d).

    The kernel aligns causality to each sample's last key, so that keys before a sample's own are
    seen by all its queries. Its signature has changed between releases; the installed one's counts.

    Args:
        blocks: samples, length and earlier block (see attention.py) of each block.
        query: (1, H, T, d).
        key: (1, H_kv, T, d).
        value: (1, H_kv, T, d).
        before: keys and values that every sample sees before its own, (1, H_kv, P, d) each.
        scaling: factor on the scores.
        window: keys that a query sees at most, itself included.
    """
    from torch.nn.attention import varlen as kernels

    q, k, v = (flat[0].transpose(0, 1) for flat in (query, key, value))
    first = [] if before is None else [[each[0].transpose(0, 1) for each in before]]
    lengths, seen, own, start = [], [], [], 0
    for count, length, after in blocks:
        own.append(start)
        earlier = list(first)
        if after is not None:
            rows = slice(own[after], own[after] + blocks[after][1])
            earlier.append([k[rows], v[rows]])
        for _ in range(count):
            lengths.append(length)
            seen.append([*earlier, [k[start : start + length], v[start : start + length]]])
            start += length
    behind = [sum(len(keys) for keys, _ in parts) for parts in seen]
    if behind != lengths:
        k, v = (torch.cat([part[i] for parts in seen for part in parts]) for i in (0, 1))
    kernel: Any = kernels.varlen_attn
    takes = inspect.signature(kernel).parameters
    options: dict[str, Any] = {}
    if "window_size" in takes:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or max(behind) <= window:
        options["is_causal"] = True
    else:
        raise ValueError("this PyTorch's varlen_attn has no sliding window")
    if "scale" in takes:
        options["scale"] = scaling
    else:
        q = q * (scaling * q.shape[-1] ** 0.5)
    groups = q.shape[1] // k.shape[1]
    if groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif groups > 1:
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    of_queries, of_keys = (_offsets(tuple(each), query.device) for each in (lengths, behind))
    out: Tensor = kernel(q, k, v, of_queries, of_keys, max(lengths), max(behind), **options)
    return out


@functools.lru_cache(maxsize=4)  # the same for every layer of a pass
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(samples + 1,) int32: where each sample begins."""
    cuts = F.pad(torch.tensor(lengths).cumsum(0), (1, 0)).int()
    there: Tensor = to_device(cuts, device)
    return there
