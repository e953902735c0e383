"""The temperature of every window of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

from flowdata._common.running_median import RunningMedian

StreamTemperature: TypeAlias = "Literal['running_median', 'batch_median'] | float"


class WindowTemperature:
    """The temperature of one window after another, under one rule.

    Args:
        rule: ``"running_median"``, ``"batch_median"``, or a positive float for all windows.
    """

    def __init__(self, rule: StreamTemperature) -> None:
        self.rule = rule
        self._median = RunningMedian()  # of what this process has read
        self._others = RunningMedian()  # of the other ranks, when they were last merged

    def of_window(self, losses: Tensor, position: int) -> float:
        """Return the temperature of the next window; a running median counts its losses first.

        Args:
            losses: (K,) floating, finite, >= 0, not empty.
            position: samples before the window, for messages.

        Raises:
            ValueError: the median is 0.
        """
        if not isinstance(self.rule, str):
            return self.rule
        if self.rule == "batch_median":
            median = losses.double().quantile(0.5).item()
        else:
            self._median.update(losses)
            median = (self._median + self._others).median()
        if median == 0:
            raise ValueError(
                f"temperature={self.rule!r} is 0 up to sample {position + len(losses)} of the "
                "stream: half of the losses are 0; pass a positive float as temperature"
            )
        return median

    def merge_ranks(self, group: Any) -> None:
        """Let the running median include what the other ranks have counted until now."""
        counts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, dict(self._median.counts), group=group)
        del counts[dist.get_rank(group)]  # this rank's own, which go on growing in `_median`
        self._others = sum(map(RunningMedian, counts), RunningMedian())

    def state_dict(self) -> dict[str, Any]:
        """Return what has been counted: plain data."""
        return {"median": dict(self._median.counts), "others": dict(self._others.counts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from what a state has counted."""
        self._median = _median_of(state_dict["median"])
        self._others = _median_of(state_dict["others"])


def _median_of(counts: Mapping[Any, int]) -> RunningMedian:
    """A median from its state, whose keys are strings if the state was JSON in between."""
    return RunningMedian({int(bucket): count for bucket, count in counts.items()})
