"""Samples found by trial: the first layout of several that a model's forward takes."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable

from torch import nn

from benchmarks.sweep.architectures import Kind
from benchmarks.sweep.building import NotBuildable, first_line
from benchmarks.sweep.samples import Data
from benchmarks.sweep.truth import own_loss


def first_that_runs(model: nn.Module, kind: Kind, layouts: Iterable[Callable[[], Data]]) -> Data:
    """Return the samples of the first layout under which every sample runs alone.

    Raises:
        NotBuildable: the model takes none of them; the message is the last failure's.
    """
    failure = "no layout of samples is known"
    for make in layouts:
        try:
            data = make()
            losses = [float(own_loss(model, data.collate([s]), kind)) for s in data.samples]
        except Exception as error:  # a model says in many ways that it takes other fields
            failure = f"no samples that it takes: {first_line(error)}"
            continue
        if all(map(math.isfinite, losses)):
            return data
        failure = "its losses are not finite"
    raise NotBuildable(failure)
