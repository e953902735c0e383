"""The denominator of an optimiser step, over all its batches and ranks: `num_items` of a loss."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from flowdata._common.resumable import check_natural


class AccumulatedBatches:
    """A loader's batches with the `num_items` of the optimiser step they belong to.

    The batches of a step are fetched together and their items summed, over ranks as well if a
    process group exists. The sum is divided by the number of ranks, because DDP and FSDP average
    gradients over them. A batch's loss over `num_items` is then its exact part of the step's loss:
    call backward on each, with no division by the accumulation steps. An `Accelerator` that
    accumulates divides by them all the same; `flowdata.integrations.accelerate` is for it.

    Args:
        loader: batches, on every rank the same number of them; its length, `set_epoch` and
            state remain with it.
        steps: batches in an optimiser step; the last step of an epoch may have fewer.
        count: batch -> its items, a number or a 0-d tensor: `count_items` of the labels, the
            number of samples, or the sum of their weights.

    Raises:
        TypeError: `count` is no function, or, in a pass, gives no number.
        ValueError: `steps` is below 1; in a pass, `count` is `len` of batches of several parts;
            or, here or at a pass, an `Accelerator` that accumulates prepared the loader, or the
            loader's length is another on another rank.

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
        steps = check_natural("steps", steps, least=1)
        if not callable(count):
            raise TypeError(
                f"count must be a function, batch -> its items, got {type(count).__name__}"
            )
        self.loader, self.steps, self.count = loader, steps, count
        _check_nobody_else_divides(loader)

    def __len__(self) -> int:
        """Return the number of batches."""
        return len(self.loader)  # type: ignore[arg-type]

    @property
    def sampler(self) -> Any:
        """The loader's sampler: frameworks call `set_epoch` on it."""
        return getattr(self.loader, "sampler", None)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each batch with its step's `num_items`, 0-d float32."""
        _check_nobody_else_divides(self.loader)
        for step, num_items in optimizer_steps(self.loader, self.steps, self.count):
            for batch in step:
                yield batch, num_items


def optimizer_steps(
    loader: Iterable[Any], steps: int, count: Callable[[Any], float | Tensor]
) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield the batches of each optimiser step and their items: the mean over ranks, 0-d float32.

    The arguments are those of `AccumulatedBatches`.
    """
    _check_equal_lengths(loader)
    batches = iter(loader)
    # The first batch of a step needs the count of its last one: all of them are read ahead.
    while step := list(islice(batches, steps)):
        if count is len and isinstance(step[0], tuple | list | Mapping):
            raise ValueError(
                f"count=len gives the parts of a batch that is a {type(step[0]).__name__}, not its "
                "samples; of (batch, weights) pass count=lambda item: len(item[1])"
            )
        yield step, mean_items(count(batch) for batch in step)


def mean_items(counts: Iterable[float | Tensor]) -> Tensor:
    """Return the items of a step: the sum over its batches, the mean over ranks, 0-d float32.

    Args:
        counts: of each batch its items, a number or a 0-d tensor.

    Raises:
        TypeError: one is something else.
    """
    values = list(counts)
    for value in values:
        if not isinstance(value, int | float) and getattr(value, "ndim", 1) != 0:
            shape = f" of shape {tuple(value.shape)}" if hasattr(value, "shape") else ""
            raise TypeError(
                "count must give the number of a batch's items, a number or a 0-d tensor, got "
                f"{type(value).__name__}{shape}"
            )
    return mean_over_ranks(torch.stack([torch.as_tensor(value).float() for value in values]).sum())


def mean_over_ranks(value: Tensor) -> Tensor:
    """Return the mean of a tensor over the ranks of the default process group, if there is one."""
    if not _is_grouped():
        return value
    total = value.cuda() if dist.get_backend() == "nccl" else value.clone()  # NCCL knows GPUs alone
    dist.all_reduce(total)
    return total / dist.get_world_size()


def _is_grouped() -> bool:
    return dist.is_available() and dist.is_initialized()


def _check_nobody_else_divides(loader: Any) -> None:
    """Refuse a loader of an `Accelerator` that accumulates, and so divides losses by the steps."""
    steps = getattr(getattr(loader, "gradient_state", None), "num_steps", 1)
    if steps > 1:
        raise ValueError(
            f"loader was prepared by an Accelerator with gradient_accumulation_steps={steps}: it "
            "divides each loss by them and asks the loader for the end of the epoch. Use "
            "flowdata.integrations.accelerate.PreparedBatches(accelerator, loader, count)"
        )


def _check_equal_lengths(loader: Any) -> None:
    """Refuse lengths that differ over ranks, where the items of a step would never come together.

    A rank that has no batch left takes no part in the sum, and the others would wait for it.
    """
    if not _is_grouped() or not hasattr(loader, "__len__"):
        return
    lengths: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(lengths, _length(loader))
    if len(set(lengths)) > 1:
        raise ValueError(
            f"loader must have the same number of batches on every rank, got {lengths}: let its "
            "sampler drop the last samples (drop_last=True), or with Accelerate fill the last "
            "batches (even_batches=True)"
        )


def _length(loader: Any) -> int | None:
    try:
        return len(loader)
    except TypeError:  # a stream's
        return None
