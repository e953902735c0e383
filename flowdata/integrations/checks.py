"""Loops that would be wrong, refused: weights that act twice, or not at all."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from flowdata.dataset import FlowWeightedDataset
from flowdata.sampler import FlowSampler


def check_loader(loader: Any) -> None:
    """Refuse a loader that both resamples by the weights and hands them to the loss.

    Raises:
        ValueError: a `FlowSampler` draws from a `FlowWeightedDataset`.
    """
    if find_sampler(loader) is not None and carries_weights(loader):
        raise ValueError(TWICE)


TWICE = (
    "the weights would act twice: a FlowSampler draws samples by their weight, and the loss would "
    "weigh them again. Keep one: FlowSampler over the plain data set with the plain loss, or "
    "FlowWeightedDataset with an ordinary sampler and a weighted loss"
)


def find_sampler(loader: Any) -> FlowSampler | None:
    """Return the `FlowSampler` of a loader, however deep samplers and wrappers hold it."""
    return next((part for part in _inside(loader) if isinstance(part, FlowSampler)), None)


def carries_weights(dataset: Any, key: str | None = None) -> bool:
    """Whether samples carry weights: a column `key`, or a `FlowWeightedDataset` somewhere inside.

    `dataset` may be a loader, too.
    """
    if key is not None and key in (getattr(dataset, "column_names", None) or ()):
        return True
    while dataset is not None:
        if isinstance(dataset, FlowWeightedDataset):
            return True
        dataset = getattr(dataset, "dataset", getattr(dataset, "loader", None))
    return False


def _inside(loader: Any, depth: int = 6) -> Iterator[Any]:
    yield loader
    if depth:
        for name in ("sampler", "batch_sampler", "base_dataloader", "loader"):
            if (part := getattr(loader, name, None)) is not None and part is not loader:
                yield from _inside(part, depth - 1)
