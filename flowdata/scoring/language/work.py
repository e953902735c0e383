"""Work: one call of a language model, and which of its outputs count.

It is made on the host, where sizes can be looked at without waiting for a device.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.errors import OutOfRangeError
from flowdata.models.tensors import to_device
from flowdata.targets.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Work:
    """One call of a model, and what to read off its outputs.

    Attributes:
        inputs: the call's keyword arguments.
        shape: (B, T), of the call's output positions.
        places: (n,) int64, the positions with a target, counted row after row through B × T.
        targets: (n,) int64, the tokens that those positions should predict.
        counts: (samples,) int64, targets of each sample, in the order in which samples lie; a
            packed call holds all of them in its one row, B = 1.
        around: makes the context that the call needs.
    """

    inputs: dict[str, Any]
    shape: torch.Size
    places: Tensor
    targets: Tensor
    counts: Tensor
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def on(self, device: torch.device) -> Work:
        """Return the same work with all its tensors but the counts on a device."""
        inputs, places, targets = to_device([self.inputs, self.places, self.targets], device)
        return replace(self, inputs=inputs, places=places, targets=targets)

    def of_targets(self, values: Tensor) -> Tensor:
        """Return the values at the positions with a target: (B, T, …) to (n, …)."""
        return values.flatten(0, 1).index_select(0, self.places)


Prepare = Callable[[nn.Module, Any], list[Work]]  # of a model and a batch, samples in their order


def make_work(
    inputs: dict[str, Any],
    targets: Tensor,
    counts: Tensor,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Work:
    """Return the work for a model's inputs and the targets of its output positions.

    Args:
        inputs: the call's keyword arguments.
        targets: (B, T) int64, −100 at positions without a target.
        counts: (samples,) int64, targets of each sample.
        around: makes the context that the call needs.

    Raises:
        ValueError: a target is negative and not −100: it would be read as another token.
    """
    flat = targets.flatten()
    places = (flat != IGNORE_INDEX).nonzero().flatten()
    tokens = flat[places]
    if (tokens < 0).any():
        raise OutOfRangeError(
            f"labels must be token ids, or {IGNORE_INDEX} where nothing counts, "
            f"got {int(tokens[tokens < 0][0])}",
            high=math.inf,
        )
    return Work(inputs, targets.shape, places, tokens, counts, around)
