"""The denominator of an optimiser step, over all its batches and ranks: `num_items` of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor


class AccumulatedBatches:
    """A loader's batches with the `num_items` of the optimiser step they belong to.

    The batches of a step are fetched together and their items summed, over ranks as well if a
    process group exists. The sum is divided by the number of ranks, because DDP and FSDP average
    gradients over them. A batch's loss over `num_items` is then its exact part of the step's loss:
    call backward on each, with no division by the accumulation steps.

    Args:
        loader: batches, on every rank the same number of them; its length, `set_epoch` and
            state remain with it.
        steps: batches in an optimiser step; the last step of an epoch may have fewer.
        count: batch -> its items, a number or a 0-d tensor: `count_items` of the labels, the
            number of samples, or the sum of their weights.

    Raises:
        ValueError: `steps` is below 1.

    Example:
        >>> import torch
        >>> loader = [torch.ones(3), torch.ones(2), torch.ones(4)]
        >>> for batch, num_items in AccumulatedBatches(loader, 2, len):
        ...     print(len(batch), num_items)
        3 tensor(5.)
        2 tensor(5.)
        4 tensor(4.)
    """

    def __init__(
        self,
        loader: Iterable[Any],
        steps: int,
        count: Callable[[Any], float | Tensor],
    ) -> None:
        if steps < 1:
            raise ValueError(f"steps must be at least 1, got {steps}")
        self.loader, self.steps, self.count = loader, steps, count

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def sampler(self) -> Any:
        """The loader's sampler: frameworks call `set_epoch` on it."""
        return getattr(self.loader, "sampler", None)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each batch with its step's `num_items`, 0-d float32."""
        batches = iter(self.loader)
        # The first batch of a step needs the count of its last one: all of them are read ahead.
        while step := list(islice(batches, self.steps)):
            counts = [torch.as_tensor(self.count(batch)).float() for batch in step]
            num_items = mean_over_ranks(torch.stack(counts).sum())
            for batch in step:
                yield batch, num_items


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks of the default process group, if there is one."""
    if not (dist.is_available() and dist.is_initialized()):
        return value
    total = value.cuda() if dist.get_backend() == "nccl" else value.clone()  # NCCL knows GPUs alone
    dist.all_reduce(total)
    return total / dist.get_world_size()
