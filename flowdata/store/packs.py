"""Packs of scored samples: columns joined, cut, put in another order and checksummed.

The columns of a store are tensors by name, laid sample after sample. Each holds one value for each
sample, except `token_loss`, which holds `count` values for each. Here are samples a and b in the
first pack and sample c in the second:

                  |    pack 0     |  pack 1  |
                  |  a     |  b   |  c       |
    loss          |  l_a   |  l_b |  l_c     |   (N,)
    count         |  2     |  1   |  3       |   (N,)
    token_loss    | a0 a1  |  b0  | c0 c1 c2 |   (Σ count,)
    offsets       0        2      3          6   (N + 1,) = offsets_of(count)

A sample's place in `token_loss` is thus another than in the other columns. To cut or move samples,
the sizes of the packs tell the place in those, and the offsets tell the place in `token_loss`.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from flowdata._common.large_array import large_array
from flowdata._common.offsets import offsets_of
from flowdata._common.safetensors_file import octets

Columns = dict[str, Tensor]


def join(packs: Sequence[Mapping[str, Tensor]]) -> Columns:
    """Return packs' columns one pack after another; all packs have the same columns."""
    return {name: torch.cat([pack[name] for pack in packs]) for name in packs[0]}


def split(columns: Mapping[str, Tensor], sizes: Tensor) -> list[Columns]:
    """Return the packs that columns consist of; the opposite of `join`.

    Args:
        columns: of all packs, one after another; `count` is among them.
        sizes: (packs,) int64, samples in each.
    """
    target_sizes = _target_bounds(columns["count"], sizes).diff()
    pieces = {
        name: values.split((target_sizes if name == "token_loss" else sizes).tolist())
        for name, values in columns.items()
    }
    return [{name: pieces[name][pack] for name in pieces} for pack in range(len(sizes))]


def reorder(columns: Mapping[str, Tensor], order: Tensor) -> Columns:
    """Return the columns of samples ``order[0]``, ``order[1]``, …; `count` is among them."""
    counts = columns["count"]
    ordered = {name: values[order] for name, values in columns.items() if name != "token_loss"}
    if "token_loss" in columns:
        starts = offsets_of(counts)[:-1][order]
        ordered["token_loss"] = columns["token_loss"][places(starts, ordered["count"])]
    return ordered


def restore(read: Callable[[], Iterable[tuple[Tensor, Columns]]], total: int) -> Columns:
    """Return the columns of packs in the order of the data set.

    They are put where they belong pack by pack, so that no more than a few packs are in memory at
    once; large columns lie in files (`large_array`).

    Args:
        read: yields the packs, anew each time it is called: the indices of a pack's samples, (n,)
            int64, and its columns, `count` among them. All packs have the same columns.
        total: samples of all packs, whose indices are 0 to total − 1.
    """
    restored: Columns = {}
    has_token_losses = False
    for indices, columns in read():
        for name in columns.keys() - {"token_loss"}:
            if name not in restored:
                restored[name] = _zeros(total, like=columns[name])
            restored[name][indices] = columns[name]
        has_token_losses = "token_loss" in columns
    if has_token_losses:
        # Where a sample's targets belong, the counts of all samples before it say.
        offsets = offsets_of(restored["count"])
        restored["token_loss"] = _zeros(int(offsets[-1]), like=columns["token_loss"])
        for indices, columns in read():
            targets = places(offsets[indices], columns["count"])
            restored["token_loss"][targets] = columns["token_loss"]
    return restored


def _zeros(length: int, *, like: Tensor) -> Tensor:
    return torch.from_numpy(large_array(length, like.numpy().dtype))


def places(starts: Tensor, counts: Tensor) -> Tensor:
    """Return the indices starts[i], …, starts[i] + counts[i] − 1 of all i, one after another.

    Args:
        starts: (N,) int64.
        counts: (N,) int64, none negative.

    Returns:
        (Σ counts,) int64.

    Example:
        >>> places(torch.tensor([5, 0, 9]), torch.tensor([2, 0, 1]))
        tensor([5, 6, 9])
    """
    # The result counts up within each run. So does arange, which is off by the same number in all
    # of a run: by how far the run's start lies from its place in the result.
    shifts = starts - offsets_of(counts)[:-1]
    return torch.arange(int(counts.sum())) + shifts.repeat_interleave(counts)


def checksums(columns: Mapping[str, Tensor], sizes: Tensor, key: str, first: int = 0) -> Tensor:
    """Return each pack's checksum: the first 8 bytes of BLAKE2b over its number and its values.

    Args:
        columns: of all packs, one after another; `count` is among them.
        sizes: (packs,) int64, samples in each.
        key: hex of at most 64 bytes; the same columns under another key are another pack.
        first: the number of the first pack.

    Returns:
        (packs,) int64.
    """
    sample_bounds = offsets_of(sizes).numpy()
    target_bounds = _target_bounds(columns["count"], sizes).numpy()
    # Views of the columns' bytes and the bytes at which packs begin and end: nothing is copied.
    views = [
        (
            octets(columns[name]),
            (target_bounds if name == "token_loss" else sample_bounds) * columns[name].itemsize,
        )
        for name in sorted(columns)
    ]
    secret = bytes.fromhex(key)
    sums = np.empty(len(sizes), dtype=np.int64)
    for pack in range(len(sizes)):
        # With its number in the digest, a pack that lies in another's place does not pass for it.
        number = (first + pack).to_bytes(8, "little")
        digest = hashlib.blake2b(number, digest_size=8, key=secret)
        for content, bounds in views:
            digest.update(content[bounds[pack] : bounds[pack + 1]])
        sums[pack] = int.from_bytes(digest.digest(), "little", signed=True)
    return torch.from_numpy(sums)


def _target_bounds(counts: Tensor, sizes: Tensor) -> Tensor:
    """Where the targets of each pack begin and the last one's end: (packs + 1,) int64."""
    return offsets_of(counts)[offsets_of(sizes)]
