"""What the integrations ask of data and loaders: do they carry weights, would these act twice?"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import WeightedRandomSampler

from flowdata._common.data_sets import is_map_style
from flowdata.sampler import FlowSampler
from flowdata.sampler.carried_weights import are_alike, carried_weights
from flowdata.sampler.sharing import check_sharing, parts_of
from flowdata.streaming import FlowWeightedIterable
from flowdata.weights import Temperature


def check_loader(loader: Any, *, weighted_loss: bool = False, num_ranks: int = 1) -> None:
    """Refuse a loader that draws samples by the weights where the loss is weighted, too.

    One whose `FlowSampler` is shared out twice, or not at all, is refused as well. A
    `WeightedRandomSampler` may balance classes; by the weights of the data set it is refused.

    Args:
        loader: a DataLoader, or a wrapper of one.
        weighted_loss: whether the loss is known to be weighted; a loader of a
            `FlowWeightedDataset` is refused in any case.
        num_ranks: the number of ranks that train on different samples, where it is known.

    Raises:
        ValueError: samples are drawn by their weights, and the loss weighs again; or the order of a
            `FlowSampler` is shared out twice, or not at all.
    """
    sampler = flow_sampler_of(loader)
    if sampler is not None:
        check_sharing(loader, sampler.num_replicas, num_ranks)
    weighs_again = sampler is not None and (weighted_loss or _weights_in(loader) is not None)
    if weighs_again or _draws_by_its_weights(loader):
        name = "WeightedRandomSampler" if sampler is None else "FlowSampler"
        raise ValueError(
            f"the weights would act twice: a {name} draws samples by their weight, and the "
            "loss would weigh them again. Keep one: FlowSampler over the plain data set with the "
            "plain loss, or FlowWeightedDataset with an ordinary sampler and a weighted loss"
        )


def flow_sampler_of(loader: Any) -> FlowSampler | None:
    """Return the `FlowSampler` of a loader, however deep samplers and wrappers hold it."""
    return next((part for part in parts_of(loader) if isinstance(part, FlowSampler)), None)


def stream_of(loader: Any) -> FlowWeightedIterable | None:
    """Return the weighted stream at the bottom of loaders and data sets, if there is one."""
    return next(
        (part for part in _sources_of(loader) if isinstance(part, FlowWeightedIterable)), None
    )


def draws_by_weight(dataset: Any) -> bool:
    """Return whether a data set is a stream that resamples, which leaves the loss alone."""
    stream = stream_of(dataset)
    return stream is not None and stream.resample


def carries_weights(dataset: Any, key: str, *, stream_does: bool = False) -> bool:
    """Return whether the samples of a data set carry their weight already.

    Args:
        dataset: a data set, or None.
        key: the weight's name in samples that are mappings.
        stream_does: the answer for a stream without column names. Its samples can't be looked at
            without being used up.
    """
    if dataset is None:
        return False
    if (stream := stream_of(dataset)) is not None:
        return not stream.resample
    if key in (getattr(dataset, "column_names", None) or ()) or _weights_in(dataset) is not None:
        return True
    if not is_map_style(dataset):
        return stream_does
    first = dataset[0] if len(dataset) else None
    return isinstance(first, Mapping) and key in first


def _draws_by_its_weights(loader: Any) -> bool:
    """Whether torch's own weighted sampler draws by the weights that the samples carry."""
    samplers = (part for part in parts_of(loader) if isinstance(part, WeightedRandomSampler))
    sampler, weights = next(samplers, None), _weights_in(loader)
    if sampler is None or weights is None:
        return False
    return are_alike(sampler.weights.numpy(), weights)


def _weights_in(loader: Any) -> NDArray[np.float32] | None:
    """The weights of all samples of a loader or data set, where these carry them."""
    found = (carried_weights(part) for part in _sources_of(loader))
    return next((weights for weights in found if weights is not None), None)


def _sources_of(loader: Any) -> Iterator[Any]:
    """Yield a loader and what it loads from, down to the data set."""
    while loader is not None:
        yield loader
        # `dataset` is what a DataLoader and a Subset call the next one, `loader` what
        # `AccumulatedBatches` does.
        loader = getattr(loader, "dataset", getattr(loader, "loader", None))


def check_temperature_acts(temperature: Temperature, dataset: Any, scores: Any) -> None:
    """Refuse a temperature where there are no scores that it could make weights of.

    Args:
        temperature: as the Trainer was given it.
        dataset: the training data, or None for a Trainer that only evaluates.
        scores: its scores or weights, or None.

    Raises:
        ValueError: it is not the default one, and the data carries its weights or has none.
    """
    if dataset is not None and scores is None and temperature != "median":
        raise ValueError(
            f"temperature={temperature!r} would be ignored without scores=: weights that "
            "train_dataset carries have theirs already; give it where they are made "
            "(FlowWeightedDataset, Scores.weights), or pass the plain data set with scores="
        )
