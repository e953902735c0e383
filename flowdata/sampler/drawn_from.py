"""What a sampler draws for: the data set of the loader that asks it for indices.

A loader is given its sampler, and a sampler no loader. While indices are drawn it is known all the
same, for the loader's own iterator is the one that asks::

    your loop → DataLoader's iterator → BatchSampler → FlowSampler
                └ has the data set
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from types import FrameType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowdata._common.notices import warn_once
from flowdata.dataset import FlowWeightedDataset
from flowdata.errors import ScoreMismatchError

# Who hands indices on as they are. A sampler of the user's own may make others of them.
_LOADERS = ("torch", "torchdata", "accelerate", "flowdata")


def check_drawn_from(weights: NDArray[np.floating], *, by_weight: bool) -> None:
    """Check, within a pass, the weights that are drawn by against the loader's data set.

    Args:
        weights: (N,) floating, of the sampler.
        by_weight: whether heavy samples are drawn more often than others.

    Raises:
        ScoreMismatchError: the data set has another number of samples than there are weights.
    """
    dataset = _dataset_of_loader()
    if dataset is None:
        return
    if hasattr(dataset, "__len__") and len(dataset) != len(weights):
        raise ScoreMismatchError(
            f"FlowSampler has {len(weights)} weights, and the data set of the loader that draws "
            f"from it {len(dataset)} samples; make it of this data set's scores, or of one weight "
            "for each sample, in the data set's order"
        )
    if by_weight and any(isinstance(part, FlowWeightedDataset) for part in _inside(dataset)):
        warn_once(
            "the weights act twice where the loss is weighted, too: a FlowSampler draws by weight "
            "from a FlowWeightedDataset; load the plain data set (`.dataset`) with the plain loss, "
            "or the weighted one without the sampler",
            about="FlowSampler over a FlowWeightedDataset",
        )


def _dataset_of_loader() -> Any:
    """The data set of the loader that is asking for indices, or None where none is in sight."""
    frame: FrameType | None = sys._getframe(1)
    while frame is not None and frame.f_globals.get("__name__", "").split(".")[0] in _LOADERS:
        state = getattr(frame.f_locals.get("self"), "__dict__", {})
        if "_index_sampler" in state and "_dataset" in state:
            return state["_dataset"]
        frame = frame.f_back
    return None


def _inside(dataset: Any) -> Iterator[Any]:
    """A data set and those inside it, as of a Subset."""
    while dataset is not None:
        yield dataset
        dataset = getattr(dataset, "dataset", None)
