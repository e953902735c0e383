"""The data set that a pass draws for, as far as who asks for its indices tells.

A sampler is not given the data set. Weights of more samples, or of fewer, would be those of other
rows, without an error unless an index lies beyond the end.
"""

from __future__ import annotations

import inspect
from typing import Any

# Who hands indices on as they are. What others ask for may be meant for a map of their own.
_HAND_ON = ("torch.utils.data", "torchdata", "accelerate")


def check_length(weights: int) -> None:
    """Check, within a pass, that the data set of the loader which asks has as many samples.

    Args:
        weights: how many samples the sampler has weights of.

    Raises:
        ValueError: the data set has another number of samples.
    """
    samples = _length_of_loaded()
    if samples is not None and samples != weights:
        raise ValueError(
            f"FlowSampler has weights of {weights} samples, the loader's data set has {samples}: "
            "pass the scores of the rows that are loaded, in their order; where rows were left out "
            "after scoring, scores[keep] with their places before that"
        )


def _length_of_loaded() -> int | None:
    """The number of samples of the asking loader's data set; None where nothing tells it."""
    frame = inspect.currentframe()
    while frame is not None and _module_of(frame).startswith("flowdata.sampler"):
        frame = frame.f_back
    while frame is not None and _module_of(frame).startswith(_HAND_ON):
        # The iterator of a DataLoader, or of one that is built like it.
        dataset = getattr(frame.f_locals.get("self"), "_dataset", None)
        if dataset is not None:
            return len(dataset) if hasattr(dataset, "__len__") else None
        frame = frame.f_back
    return None


def _module_of(frame: Any) -> str:
    return str(frame.f_globals.get("__name__", ""))
