"""Packs of scored samples: columns joined, cut, put in another order and checksummed.

Columns are tensors by name. Each holds one value for each sample, but `token_loss`, which holds
`count` values for each, sample after sample.
"""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

Columns = dict[str, Tensor]


def join(packs: Sequence[Mapping[str, Tensor]]) -> Columns:
    """Return packs' columns one pack after another."""
    return {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}


def split(columns: Mapping[str, Tensor], sizes: Tensor) -> list[Columns]:
    """Cut columns into packs of so many samples; the opposite of `join`."""
    ends = torch.cat([torch.zeros(1, dtype=torch.long), columns["count"].cumsum(0)])
    targets = ends[torch.cat([torch.zeros(1, dtype=torch.long), sizes.cumsum(0)])].diff()
    cut = {
        name: values.split((targets if name == "token_loss" else sizes).tolist())
        for name, values in columns.items()
    }
    return [{name: parts[index] for name, parts in cut.items()} for index in range(len(sizes))]


def reorder(columns: Mapping[str, Tensor], order: Tensor) -> Columns:
    """Return the columns of samples ``order[0]``, ``order[1]``, …"""
    counts = columns["count"]
    ordered = {name: values[order] for name, values in columns.items() if name != "token_loss"}
    if "token_loss" in columns:
        starts = (counts.cumsum(0) - counts)[order]
        ordered["token_loss"] = columns["token_loss"][places(starts, ordered["count"])]
    return ordered


def places(starts: Tensor, counts: Tensor) -> Tensor:
    """Return the indices starts[i], …, starts[i] + counts[i] − 1 of all i, one after another."""
    shift = starts - (counts.cumsum(0) - counts)
    return torch.arange(int(counts.sum())) + shift.repeat_interleave(counts)


def checksums(columns: Mapping[str, Tensor], sizes: Tensor, key: str) -> Tensor:
    """Return each pack's checksum, (packs,) int64: BLAKE2b over its number and columns' bytes.

    Args:
        columns: of all packs, one after another.
        sizes: (packs,) int64, samples in each.
        key: hex of at most 64 bytes; the same columns under another key are another pack.
    """
    sample_ends = np.concatenate([[0], sizes.cumsum(0).numpy()])
    target_ends = np.concatenate([[0], columns["count"].cumsum(0).numpy()])[sample_ends]
    views = [
        (
            octets(columns[name]),
            (target_ends if name == "token_loss" else sample_ends) * columns[name].itemsize,
        )
        for name in sorted(columns)
    ]
    secret = bytes.fromhex(key)
    sums = np.empty(len(sizes), dtype=np.int64)
    for pack in range(len(sizes)):
        digest = hashlib.blake2b(pack.to_bytes(8, "little"), digest_size=8, key=secret)
        for content, ends in views:
            digest.update(content[ends[pack] : ends[pack + 1]])
        sums[pack] = int.from_bytes(digest.digest(), "little", signed=True)
    return torch.from_numpy(sums)


def octets(tensor: Tensor) -> memoryview:
    """Return a contiguous tensor's bytes."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
