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
from torch import Tensor

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
        costs: (packs,) int64, tokens (or samples) that a pack runs, padding included.
        options: what the packs were cut by.
    """

    order: Tensor
    offsets: Tensor
    costs: Tensor
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
) -> Plan:
    """Return a plan whose padded packs, longest samples first, hold at most `max_tokens`.

    Samples of like length share a pack, so little is padding; the longest come first, so that a
    pack too large for memory is met at once. A sample longer than the budget is a pack alone.

    Args:
        lengths: (N,) int64, tokens in each sample.
        max_tokens: the budget of one pack, counted with padding.
        batch_size: most samples in a pack; no limit if None.
        groups: (N,) int64 in [0, N); samples of a group stay together, as long as its longest.

    Example:
        >>> plan = plan_padded(torch.tensor([2, 9, 3, 4]), max_tokens=9)
        >>> [plan.pack(i).tolist() for i in range(len(plan))]
        [[1], [3, 2], [0]]
    """
    sizes = np.maximum(lengths.numpy(), 1)
    if groups is not None:
        longest_in_group = np.zeros(len(sizes), dtype=sizes.dtype)
        np.maximum.at(longest_in_group, groups.numpy(), sizes)
        sizes = longest_in_group[groups.numpy()]
    order = _longest_first(sizes, groups)
    offsets = _cut(sizes[order], max_tokens, len(order) if batch_size is None else batch_size)
    costs = sizes[order][offsets[:-1]] * np.diff(offsets)  # a pack's first sample is its longest
    return Plan(torch.from_numpy(order), torch.from_numpy(offsets), torch.from_numpy(costs))


def _longest_first(sizes: _Integers, groups: Tensor | None) -> _Integers:
    """Sort samples by falling size, those of a group together, equals in data set order."""
    # numpy sorts integers of 8 and 16 bits by radix, much faster than those of 64. How much a
    # sample is shorter than the longest one is small, rises as sizes fall, and fits such integers.
    shortness = (sizes.max() - sizes).astype(np.min_scalar_type(sizes.max()))
    if groups is None:
        return np.argsort(shortness, kind="stable")
    order: _Integers = np.lexsort((groups.numpy(), shortness))
    return order


def _cut(falling_sizes: _Integers, max_tokens: int, batch_size: int) -> _Integers:
    """Return where packs begin: each takes as many samples as fit, at the size of its first."""
    offsets = [0]
    while offsets[-1] < len(falling_sizes):
        samples = min(int(max_tokens // falling_sizes[offsets[-1]]), batch_size)
        offsets.append(min(offsets[-1] + max(1, samples), len(falling_sizes)))
    return np.asarray(offsets, dtype=np.int64)


def plan_fixed(num_samples: int, *, batch_size: int) -> Plan:
    """Return a plan of batches in data set order, for samples that are all alike in size."""
    offsets = torch.arange(0, num_samples + batch_size, batch_size).clamp_(max=num_samples)
    return Plan(torch.arange(num_samples), offsets, offsets.diff())
