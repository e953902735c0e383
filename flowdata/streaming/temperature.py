"""The temperature of every window of a stream."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

from flowdata.streaming.running_median import RunningMedian

StreamTemperature: TypeAlias = "Literal['running_median', 'batch_median'] | float"


class WindowTemperature:
    """The temperature of one window after another, by one rule.

    Args:
        rule: ``"running_median"``, ``"batch_median"``, or a positive float for all windows.
    """

    def __init__(self, rule: StreamTemperature) -> None:
        self.rule = rule
        self._median = RunningMedian()  # of the losses that this process has read
        self._median_of_others = RunningMedian()  # of the other ranks' losses at the last merge

    def of_window(self, losses: Tensor, position: int) -> float:
        """Return the temperature of the next window, whose losses a running median counts first.

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
            median = (self._median + self._median_of_others).median()
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
        del counts[dist.get_rank(group)]  # `_median` has this rank's counts, and goes on counting
        self._median_of_others = sum(map(RunningMedian, counts), RunningMedian())

    def state_dict(self) -> dict[str, Any]:
        """Return the counts of both medians: plain data."""
        return {"median": dict(self._median.counts), "others": dict(self._median_of_others.counts)}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on from the counts of a state."""
        self._median = _median_of(state_dict["median"])
        self._median_of_others = _median_of(state_dict["others"])


def _median_of(counts: Mapping[Any, int]) -> RunningMedian:
    """The median that a state's counts make; JSON has turned the keys of some states to strings."""
    return RunningMedian({int(bucket): count for bucket, count in counts.items()})
