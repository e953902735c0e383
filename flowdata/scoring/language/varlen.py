"""Variable-length attention on a GPU: PyTorch's own flash kernel over samples laid end to end.

The kernel takes (T, H, d) queries and (T', H_kv, d) keys and values, and where each sample begins
in them. It aligns causality to each sample's last key, so that a sample's queries all see the keys
before its own:

    samples    a a a a | b b          behind a prefix P of two tokens
    queries    a a a a b b            begin at 0, 4; end at 6
    keys       P P a a a a P P b b    begin at 0, 6; end at 10
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Container, Sequence
from typing import Any

import torch
from torch import Tensor

from flowdata._common.offsets import offsets_of
from flowdata.models.tensors import to_device
from flowdata.scoring.language.blocks import Block, KeysAndValues


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
    blocks: Sequence[Block],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: KeysAndValues | None,
    scaling: float,
    window: int | None,
) -> Tensor:
    """Return the causal attention of all samples in one call, (T, H, d).

    Args:
        blocks: in the order in which they lie.
        query: (1, H, T, d).
        key: (1, H_kv, T, d).
        value: (1, H_kv, T, d).
        before: keys and values that every sample sees before its own, (1, H_kv, P, d) each.
        scaling: factor on the scores.
        window: keys that a query sees at most, itself included.

    Raises:
        ValueError: a window that hides keys, and a PyTorch whose kernel has none.
    """
    from torch.nn.attention import varlen as kernels

    q, k, v = (flat[0].transpose(0, 1) for flat in (query, key, value))
    queries = [block.length for block in blocks for _ in range(block.samples)]
    if before is None and all(block.after is None for block in blocks):
        keys = queries
    else:
        prefix = None if before is None else [each[0].transpose(0, 1) for each in before]
        keys, k, v = _behind_earlier(blocks, k, v, prefix)
    takes = inspect.signature(kernels.varlen_attn).parameters
    options = _window_options(takes, window, max(keys))
    if "scale" in takes:
        options["scale"] = scaling
    else:  # then the kernel's own factor is width ** -0.5
        q = q * (scaling * q.shape[-1] ** 0.5)
    groups = q.shape[1] // k.shape[1]  # query heads that share a head of keys
    if groups > 1 and "enable_gqa" in takes:
        options["enable_gqa"] = True
    elif groups > 1 and not _takes_groups(kernels.varlen_attn, query.device):
        k, v = k.repeat_interleave(groups, 1), v.repeat_interleave(groups, 1)
    begins = [_offsets(tuple(lengths), query.device) for lengths in (queries, keys)]
    kernel: Any = kernels.varlen_attn
    output: Tensor = kernel(q, k, v, *begins, max(queries), max(keys), **options)
    return output


def _behind_earlier(
    blocks: Sequence[Block], k: Tensor, v: Tensor, prefix: Sequence[Tensor] | None
) -> tuple[list[int], Tensor, Tensor]:
    """Every sample's keys and values behind those that it sees before, and how many they are.

    Each sample has a copy of its own of the prefix's and prompt's, because the kernel takes one
    run of keys for each.
    """
    first = [] if prefix is None else [prefix]
    counts: list[int] = []
    parts: list[Sequence[Tensor]] = []  # of keys and values
    starts: list[int] = []  # of blocks
    start = 0
    for samples, length, after in blocks:
        starts.append(start)
        earlier = list(first)
        if after is not None:
            prompt = slice(starts[after], starts[after] + blocks[after].length)
            earlier.append([k[prompt], v[prompt]])
        for _ in range(samples):
            own = slice(start, start + length)
            parts += [*earlier, [k[own], v[own]]]
            counts.append(length + sum(len(keys) for keys, _ in earlier))
            start += length
    return (
        counts,
        torch.cat([keys for keys, _ in parts]),
        torch.cat([values for _, values in parts]),
    )


def _window_options(takes: Container[str], window: int | None, most_keys: int) -> dict[str, Any]:
    """Causality and a window, as the installed release's kernel takes them."""
    if "window_size" in takes:
        return {"window_size": (-1 if window is None else window - 1, 0)}
    if window is None or most_keys <= window:
        return {"is_causal": True}
    raise ValueError("this PyTorch's varlen_attn has no sliding window")


@functools.cache
def _takes_groups(kernel: Any, device: torch.device) -> bool:
    """Whether a kernel without the option takes fewer heads of keys than of queries all the same.

    PyTorch's own flash kernel does, although the releases up to 2.12 don't say so; it is asked once
    and its answer compared with that for repeated heads.
    """
    q, k, v = torch.randn(3, 5, 4, 64, device=device).bfloat16()
    begins = torch.tensor([0, 5], dtype=torch.int32, device=device)
    options = _window_options(inspect.signature(kernel).parameters, None, 5)
    few = k[:, :2], v[:, :2]
    repeated = [heads.repeat_interleave(2, 1) for heads in few]
    try:
        grouped: Tensor = kernel(q, *few, begins, begins, 5, 5, **options)
    except RuntimeError:
        return False
    return torch.equal(grouped, kernel(q, *repeated, begins, begins, 5, 5, **options))


@functools.lru_cache(maxsize=4)  # the same for every layer of a pass
def _offsets(lengths: tuple[int, ...], device: torch.device) -> Tensor:
    """(samples + 1,) int32: where each sample begins, and the last ends."""
    offsets: Tensor = to_device(offsets_of(torch.tensor(lengths)).int(), device)
    return offsets
