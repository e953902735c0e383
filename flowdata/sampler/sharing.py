"""Who shares an epoch out among the ranks: the sampler, or the loader that Accelerate prepared.

One of them has to, and only one: a loader that `prepare` returned deals out what its sampler gives,
so that a sampler which gives its rank's share already would lose the rest of the epoch.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from typing import Any

import torch.distributed as dist
from torch.utils.data import DataLoader, Sampler

from flowdata._common.resumable import check_rank

_HOLDERS = (Sampler, DataLoader)
_DEPTH = 6  # of loaders and samplers inside one another; the bound ends a circle of them


class Share:
    """A rank's share of a sampler's order, by the ranks that exist when it is asked for.

    Args:
        num_replicas: number of ranks, or None for that of the process group.
        rank: this rank, or None for that in the process group.

    Raises:
        ValueError: there is no such rank.
    """

    def __init__(self, num_replicas: int | None, rank: int | None) -> None:
        self.num_replicas, self.rank = num_replicas, rank
        # The process group's ranks when last looked at: a copy in a spawned worker has no group,
        # and a state may be saved after the group is gone.
        self._group = 1, 0
        num_ranks, number = self.ranks()
        check_rank(number, num_ranks)

    def ranks(self) -> tuple[int, int]:
        """Return the number of ranks that share the order at this moment, and this rank's."""
        if self._is_left_to_loader():
            return 1, 0
        if dist.is_available() and dist.is_initialized():
            self._group = dist.get_world_size(), dist.get_rank()
        num_replicas, rank = self._group
        return (
            num_replicas if self.num_replicas is None else self.num_replicas,
            rank if self.rank is None else self.rank,
        )

    def check_pass(self, sampler: Any) -> None:
        """Check, within a pass over a sampler, that its order is shared out once.

        Raises:
            ValueError: it is shared out twice, or not at all.
        """
        num_replicas, rank = self.ranks()
        check_rank(rank, num_replicas)
        loader = _prepared_loader_of(sampler)
        if loader is not None:
            check_sharing(loader, num_replicas)
        elif self._is_left_to_loader():
            raise ValueError(
                "FlowSampler leaves an Accelerator's ranks to the loader that prepare returns, but "
                "is drawn from outside of one: give the loader to accelerator.prepare, or pass "
                "num_replicas=accelerator.num_processes, rank=accelerator.process_index"
            )

    def _is_left_to_loader(self) -> bool:
        """Whether the loader that Accelerate prepares is to share the order out."""
        state = sys.modules.get("accelerate.state")
        return (
            self.num_replicas is None
            and self.rank is None
            and state is not None
            and state.is_initialized()
            and state.AcceleratorState().num_processes > 1
        )


def check_sharing(loader: Any, num_replicas: int, num_ranks: int = 1) -> None:
    """Refuse a loader that shares the order of a `FlowSampler` inside it out twice, or not at all.

    Args:
        loader: a loader, prepared by Accelerate or not.
        num_replicas: the number of ranks for which the sampler gives a share.
        num_ranks: the number of ranks that train on different samples, where it is known.

    Raises:
        ValueError: most of the epoch would be lost, or every rank would draw all of it.
    """
    shares = _shares_of(loader)
    if num_replicas > 1 and shares > 1:
        raise ValueError(
            f"FlowSampler takes one of num_replicas={num_replicas} shares of the order, which the "
            f"loader prepared by Accelerate would share out again among {shares} ranks, so that "
            "most of the epoch would be lost: pass num_replicas=1, rank=0"
        )
    if num_replicas == 1 and shares == 1 and num_ranks > 1:
        raise ValueError(
            f"FlowSampler gives the whole order to each of {num_ranks} ranks, which would all "
            "train on the same samples: make it without num_replicas and rank"
        )


def parts_of(loader: Any, depth: int = _DEPTH) -> Iterator[Any]:
    """Yield a loader, its samplers, and those of the loaders and samplers inside it."""
    yield loader
    if not depth:
        return
    # Accelerate's loaders hold theirs as `base_dataloader`, and `AccumulatedBatches` as `loader`; a
    # batch sampler holds the sampler whose indices it groups, one of the user's under any name.
    names = ("sampler", "batch_sampler", "base_dataloader", "loader")
    parts = [getattr(loader, name, None) for name in names]
    parts += [v for v in getattr(loader, "__dict__", {}).values() if isinstance(v, _HOLDERS)]
    for part in {id(part): part for part in parts}.values():
        if part is not None and part is not loader:
            yield from parts_of(part, depth - 1)


def _prepared_loader_of(sampler: Any) -> Any:
    """The loader prepared by Accelerate whose current pass draws from a sampler, or None."""
    state = sys.modules.get("accelerate.state")
    if state is None or not state.GradientState().initialized:
        return None
    passes = state.GradientState().dataloader_references  # of loaders now iterated, innermost last
    holders = (p for p in reversed(passes) if any(part is sampler for part in parts_of(p)))
    return next(holders, None)


def _shares_of(loader: Any) -> int:
    """Into how many shares a loader deals out what its sampler gives; 1 for a plain one."""
    module = sys.modules.get("accelerate.data_loader")
    if module is None:
        return 1
    if isinstance(loader, module.DataLoaderDispatcher):
        return int(loader.state.num_processes)  # rank 0 alone reads, and sends each rank its part
    shards = [p for p in parts_of(loader) if isinstance(p, module.BatchSamplerShard)]
    return max((shard.num_processes for shard in shards), default=1)
