"""Batches: a pack's samples read and collated, and a few of them collated alone as well.

What is collated alone is what the check of the run looks at: a random few in a thousand, the same
ones whoever reads them, a few of the largest pack, and the first of each kind of sample that no
check has seen yet.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Sequence, Set
from typing import Any, NamedTuple

import torch
from torch.utils.data import DataLoader, Dataset

from flowdata._common.unreadable import Unreadable
from flowdata.scoring.collate import Collate
from flowdata.scoring.grouping import Grouping
from flowdata.scoring.job import Job
from flowdata.scoring.kinds import kind_of

_IN_A_THOUSAND = 2  # samples that are checked
_MOST_NEW_KINDS = 16  # of which a process checks the first sample


class Batch(NamedTuple):
    """What a DataLoader makes of a pack.

    Attributes:
        content: the readable samples, collated group by group; empty where there are none.
        unreadable: why samples could not be read, by their place in the pack.
        alone: samples collated alone, by their place among the readable ones.
    """

    content: list[Any]
    unreadable: dict[int, str]
    alone: dict[int, Any]


def load_batches(
    job: Job,
    packs: Iterator[list[int]],
    grouping: Grouping,
    kinds: Sequence[Hashable] | None,
    also: Set[int] = frozenset(),
) -> Iterator[Batch]:
    """Read and collate packs' samples, given by their indices, as the packs are claimed.

    Args:
        job: whose data set, collate function and workers.
        packs: the indices of each pack's samples.
        grouping: which samples of a pack are collated together.
        kinds: of samples that were checked already; None checks none.
        also: the indices of further samples to check.
    """
    loader: DataLoader[Any] = DataLoader(
        _Numbered(job.dataset),
        batch_sampler=packs,  # it need not have a length
        collate_fn=_CollatePack(job.collate, grouping, kinds, also),
        num_workers=job.num_workers,
        pin_memory=job.device.type == "cuda",  # nothing waits for copies from pinned memory
        # The default generator would be drawn from, and the caller's random numbers change.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        batches = iter(loader)
    except Exception as error:  # its type depends on what can't be pickled
        if job.num_workers == 0 or "pickle" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(
            f"the data set or collate_fn can't be sent to DataLoader workers ({error}); define it "
            "at the top level of a module, or pass num_workers=0"
        ) from error
    yield from batches


class _Numbered(Dataset[Any]):
    """A data set whose samples come with their indices."""

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> tuple[int, Any]:
        return index, self.dataset[index]

    def __getitems__(self, indices: list[int]) -> list[tuple[int, Any]]:
        if hasattr(self.dataset, "__getitems__"):
            return list(zip(indices, self.dataset.__getitems__(indices), strict=True))
        return [self[index] for index in indices]


class _CollatePack:
    """Collates the samples that could be read, and keeps the reasons of the others."""

    def __init__(
        self,
        collate: Collate,
        grouping: Grouping,
        kinds: Sequence[Hashable] | None,
        also: Set[int],
    ) -> None:
        self.also = also
        self.collate, self.grouping = collate, grouping
        self.checks = kinds is not None
        self.kinds = set(kinds or ())
        self.most_kinds = len(self.kinds) + _MOST_NEW_KINDS

    def __call__(self, numbered: list[tuple[int, Any]]) -> Batch:
        unreadable = {
            place: sample.reason
            for place, (_, sample) in enumerate(numbered)
            if isinstance(sample, Unreadable)
        }
        readable = [pair for pair in numbered if not isinstance(pair[1], Unreadable)]
        content = self._collated(readable) if readable else []
        alone = {
            place: self.collate([sample])
            for place, (index, sample) in enumerate(readable)
            if self.checks and self._is_checked(index, sample)
        }
        return Batch(content, unreadable, alone)

    def _collated(self, numbered: list[tuple[int, Any]]) -> list[Any]:
        """The groups' batches; an error names the first sample that can't be collated alone."""
        try:
            return [self.collate(group) for group in self.grouping([each for _, each in numbered])]
        except ValueError:
            for index, sample in numbered:
                try:
                    self.collate([sample])
                except ValueError as error:
                    place = f"(sample {index:,}; samples count from 0)"
                    raise ValueError(f"{error} {place}") from error
            raise

    def _is_checked(self, index: int, sample: Any) -> bool:
        kind = kind_of(sample)
        is_new = kind not in self.kinds and len(self.kinds) < self.most_kinds
        if is_new:
            self.kinds.add(kind)
        return is_new or index in self.also or is_drawn(index)


def is_drawn(index: int) -> bool:
    """Return whether a sample is among the random few that are checked, by its index alone."""
    # A multiplicative hash (Knuth, The Art of Computer Programming, vol. 3, 6.4): the product with
    # 2^32 over the golden ratio spreads neighbouring indices evenly.
    return (index + 1) * 2654435769 % 2**32 < 2**32 * _IN_A_THOUSAND // 1000
