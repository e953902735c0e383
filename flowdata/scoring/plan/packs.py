"""The plan: a data set cut into packs, a pure function of lengths, budget and options.

A pack is the unit of work, of storage and of resumption. Which samples share a pack decides
the last bits of their losses, so a store keeps the plan that it was begun with.
"""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from flowdata._common.large_array import large_array

_AT_ONCE = 1 << 20  # samples that are sorted at a time
_Integers = np.ndarray[Any, np.dtype[np.int64]]


@dataclass(frozen=True)
class PlanOptions:
    """What the packs of a plan were cut by, and how each of them is run.

    The last bits of a loss depend on all of it, so a store keeps it and every rank shares it.

    Attributes:
        max_tokens: tokens in one pack, padding included; None where samples have no length.
        batch_size: most samples in one pack; None: no limit.
        prefix: tokens with which all samples begin, run once for all packs.
        shared_prompts: tokens that are saved by running shared prompts once.
        compile: whether the model's layers are compiled.
        threads: with which PyTorch computes on a CPU.
        attention_by_products: whether a CPU makes the attention of packed samples by products
            (flowdata/scoring/language/products.py) instead of by PyTorch's kernel.
    """

    max_tokens: int | None = None
    batch_size: int | None = None
    prefix: int = 0
    shared_prompts: int = 0
    compile: bool = False
    threads: int = 1
    attention_by_products: bool = False

    def as_begun(self, plan_field: Mapping[str, Any]) -> PlanOptions:
        """Return the options that a store was begun with, from the `plan` field of its manifest.

        What that field lacks is taken from these options; the plan made with them then differs
        from the field in what was lacking, and the store is refused by that name.
        """
        begun = {name: plan_field[name] for name in asdict(self) if name in plan_field}
        return replace(self, **begun)


@dataclass(frozen=True)
class Plan:
    """Packs of samples, in the order in which they are run.

    Attributes:
        order: (N,) int64, every sample's index once, pack after pack.
        offsets: (packs + 1,) int64; pack p is ``order[offsets[p]:offsets[p + 1]]``.
        amounts: (packs,) int64, the tokens of each pack's samples, padding left out; its samples
            where these have no length.
        options: what the packs were cut by.
    """

    order: Tensor
    offsets: Tensor
    amounts: Tensor
    options: PlanOptions = field(default_factory=PlanOptions)

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def pack(self, index: int) -> Tensor:
        """Return the sample indices of one pack, int64."""
        return self.order[self.offsets[index] : self.offsets[index + 1]]

    @property
    def sizes(self) -> Tensor:
        """Samples in each pack, (packs,) int64."""
        return self.offsets.diff()

    @functools.cached_property
    def digest(self) -> str:
        """Hex SHA-256 of the order and the cuts."""
        digest = hashlib.sha256(self.order.numpy().data)  # as they lie in memory, without a copy
        digest.update(self.offsets.numpy().data)
        return digest.hexdigest()

    def to_manifest(self) -> dict[str, Any]:
        """Return the `plan` field of a store's manifest: the options, and what was made of them."""
        return {**asdict(self.options), "packs": len(self), "digest": self.digest}


def plan_padded(
    lengths: Tensor,
    *,
    max_tokens: int,
    batch_size: int | None = None,
    groups: Tensor | None = None,
    saved: Tensor | int = 0,
) -> Plan:
    """Return a plan whose padded packs, longest samples first, hold at most `max_tokens`.

    Samples of like length share a pack, so little is padding; the longest come first, so that a
    pack too large for memory is met at once. A sample longer than the budget is a pack alone.

    Args:
        lengths: (N,) integer, tokens in each sample.
        max_tokens: the budget of one pack, counted with padding.
        batch_size: most samples in a pack; no limit if None.
        groups: (N,) int64 in [0, N); samples of a group stay together, as long as its longest.
        saved: (N,) integer, tokens of each sample that packs don't run; or one number for all.

    Example:
        >>> plan = plan_padded(torch.tensor([2, 9, 3, 4]), max_tokens=9)
        >>> [plan.pack(i).tolist() for i in range(len(plan))]
        [[1], [3, 2], [0]]
    """
    tokens_saved = saved if isinstance(saved, int) else saved.numpy()
    sizes = large_array(len(lengths), np.int32)
    np.subtract(lengths.numpy(), tokens_saved, out=sizes, casting="unsafe")
    np.maximum(sizes, 1, out=sizes)
    if groups is None:
        order = _longest_first(sizes)
    else:
        longest_in_group = np.zeros_like(sizes)
        np.maximum.at(longest_in_group, groups.numpy(), sizes)
        sizes = longest_in_group[groups.numpy()]
        order = np.lexsort((groups.numpy(), -sizes))
    most = len(order) if batch_size is None else batch_size
    cuts = torch.from_numpy(_cut(sizes, order, max_tokens, most))
    in_order = torch.from_numpy(order)
    return Plan(in_order, cuts, _amounts(lengths, in_order, cuts))


def _longest_first(sizes: NDArray[np.int32]) -> _Integers:
    """Sort samples by falling size, equals in data set order.

    A part of them is sorted at a time, and put where those of its sizes in the parts before it end:
    sorting ten million at once would take hundreds of megabytes.
    """
    starts = range(0, len(sizes), _AT_ONCE)
    parts = [sizes[start : start + _AT_ONCE] for start in starts]
    rising = np.unique(np.concatenate([np.unique(part) for part in parts]))

    def ranks(part: NDArray[np.int32]) -> _Integers:
        """The place of each sample's size among all sizes, 0 for the largest."""
        return len(rising) - 1 - np.searchsorted(rising, part)

    counts = sum(np.bincount(ranks(part), minlength=len(rising)) for part in parts)
    ends = np.cumsum(counts) - counts  # of what is in order so far, of each size
    order = large_array(len(sizes), np.int64)
    for start, part in zip(starts, parts, strict=True):
        ranks_here = ranks(part)
        by_rank = np.argsort(ranks_here, kind="stable")
        counts_here = np.bincount(ranks_here, minlength=len(rising))
        within = np.arange(len(part)) - np.repeat(np.cumsum(counts_here) - counts_here, counts_here)
        order[np.repeat(ends, counts_here) + within] = start + by_rank
        ends += counts_here
    return order


def _cut(sizes: NDArray[np.int32], order: _Integers, max_tokens: int, batch_size: int) -> _Integers:
    """Return where packs begin: each takes as many samples as fit, at the size of its first."""
    offsets = [0]
    while offsets[-1] < len(order):
        samples = min(max_tokens // int(sizes[order[offsets[-1]]]), batch_size)
        offsets.append(min(offsets[-1] + max(1, samples), len(order)))
    return np.asarray(offsets, dtype=np.int64)


def _amounts(lengths: Tensor, order: Tensor, offsets: Tensor) -> Tensor:
    """Return the tokens of each pack's samples, (packs,) int64."""
    amounts = torch.zeros(len(offsets) - 1, dtype=torch.long)
    for start in range(0, len(order), _AT_ONCE):
        samples = order[start : start + _AT_ONCE]
        places = torch.arange(start, start + len(samples))
        packs = torch.searchsorted(offsets, places, right=True) - 1
        amounts.index_add_(0, packs, lengths[samples].long())
    return amounts


def plan_fixed(num_samples: int, *, batch_size: int) -> Plan:
    """Return a plan of batches in data set order, for samples that are all alike in size."""
    offsets = torch.arange(0, num_samples + batch_size, batch_size).clamp_(max=num_samples)
    return Plan(torch.arange(num_samples), offsets, offsets.diff())
