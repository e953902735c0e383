"""The data set that a pass draws for, as far as who asks for its indices tells.

A sampler is not given the data set. Weights of more samples, or of fewer, would be those of other
rows, without an error unless an index lies beyond the end; and a data set that gives the same
weights to the loss would apply them twice.
"""

from __future__ import annotations

import inspect
import weakref
from contextlib import suppress
from typing import Any

from numpy.typing import NDArray

from flowdata.dataset import FlowWeightedDataset, check_match
from flowdata.sampler.carried_weights import are_alike, carried_weights

# Who hands indices on as they are. What others ask for may be meant for a map of their own.
_HAND_ON = ("torch.utils.data", "torchdata", "accelerate")


class LoadedData:
    """The check of the data sets of loaders that ask for indices.

    Args:
        weights: (N,) the sampler's.
        scores: what they were made of: scores know their data set.
    """

    def __init__(self, weights: NDArray[Any], scores: Any) -> None:
        self.weights, self.scores = weights, scores
        self._known: weakref.ref[Any] | None = None  # the data set that was checked

    def __getstate__(self) -> dict[str, Any]:
        """Return what is pickled and copied: a copy has yet to see its data set."""
        return {**vars(self), "_known": None}

    def check(self) -> None:
        """Check, within a pass, that the data set of the loader which asks fits the weights.

        Raises:
            ScoreMismatchError: the scores are of another data set.
            ValueError: the data set has another number of samples, or gives the same weights.
        """
        dataset = _loaded_data()
        if dataset is None or (self._known is not None and self._known() is dataset):
            return
        _check_weights(self.weights, dataset)
        inner = dataset.dataset if isinstance(dataset, FlowWeightedDataset) else dataset
        if hasattr(inner, "__len__") and hasattr(inner, "__getitem__"):
            check_match(inner, self.scores, view=False)
        with suppress(TypeError):  # a list has no weak references
            self._known = weakref.ref(dataset)


def _check_weights(weights: NDArray[Any], dataset: Any) -> None:
    if hasattr(dataset, "__len__") and len(dataset) != len(weights):
        raise ValueError(
            f"FlowSampler has weights of {len(weights)} samples, the loader's data set has "
            f"{len(dataset)}: pass the scores of the rows that are loaded, in their order; where "
            "rows were left out after scoring, scores[keep] with their places before that"
        )
    carried = carried_weights(dataset)
    if carried is not None and are_alike(weights, carried):
        raise ValueError(
            "FlowSampler draws samples by the weights that the loader's FlowWeightedDataset gives "
            "to the loss, so that they would act twice: load the unweighted data set, or leave the "
            "sampler out"
        )


def _loaded_data() -> Any:
    """The asking loader's data set; None where nothing tells it."""
    frame = inspect.currentframe()
    while frame is not None and _module_of(frame).startswith("flowdata.sampler"):
        frame = frame.f_back
    while frame is not None and _module_of(frame).startswith(_HAND_ON):
        # The iterator of a DataLoader, or of one that is built like it.
        dataset = getattr(frame.f_locals.get("self"), "_dataset", None)
        if dataset is not None:
            return dataset
        frame = frame.f_back
    return None


def _module_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))
