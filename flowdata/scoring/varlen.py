"""Variable-length attention on a GPU: PyTorch's own flash kernel over samples laid end to end."""

from __future__ import annotations

import functools
import inspect
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


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
    blocks: list[tuple[int, int]],
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
        blocks: (samples, length) of each block, in the order in which they lie.
        query: (1, H, T, d).
        key: (1, H_kv, T, d).
        value: (1, H_kv, T, d).
        before: keys and values that every sample sees before its own, (1, H_kv, P, d) each.
        scaling: factor on the scores.
        window: keys that a query sees at most, itself included.
    """
    from torch.nn.attention import varlen as kernels

    lengths = tuple(length for count, length in blocks for _ in range(count))
    q, k, v = (flat[0].transpose(0, 1) for flat in (query, key, value))
    extra = 0
    if before is not None:
        extra = before[0].shape[2]
        k, v = (
            torch.cat([x for part in own.split(lengths) for x in (prefix[0].transpose(0, 1), part)])
            for prefix, own in zip(before, (k, v), strict=True)
        )
    kernel: Any = kernels.varlen_attn
    takes = inspect.signature(kernel).parameters
    options: dict[str, Any] = {}
    if "window_size" in takes:
        options["window_size"] = (-1 if window is None else window - 1, 0)
    elif window is None or max(lengths) + extra <= window:
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
    of_queries = _offsets(lengths, 0, query.device)
    of_keys = _offsets(lengths, extra, query.device)
    longest = max(lengths)
    out: Tensor = kernel(q, k, v, of_queries, of_keys, longest, longest + extra, **options)
    return out


@functools.lru_cache(maxsize=4)  # the same for every layer of a pass
def _offsets(lengths: tuple[int, ...], extra: int, device: torch.device) -> Tensor:
    """(samples + 1,) int32: where each sample begins."""
    cuts = F.pad((torch.tensor(lengths) + extra).cumsum(0), (1, 0)).int()
    return cuts.to(device, non_blocking=True)
