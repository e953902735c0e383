"""The temperature of every window of a stream."""

from __future__ import annotations

import math
from collections.abc import Mapping
from typing import Any, Literal, TypeAlias

import torch.distributed as dist
from torch import Tensor

from flowdata._common.real_numbers import as_float
from flowdata.streaming.running_median import RunningMedian

StreamTemperature: TypeAlias = "Literal['running_median', 'batch_median'] | float"
_RULES: tuple[Literal["running_median", "batch_median"], ...] = ("running_median", "batch_median")


def check_stream_temperature(temperature: Any) -> StreamTemperature:
    """Return the temperature of a stream, checked: a rule by name, or a number as a float.

    Raises:
        ValueError: it is neither, or not positive and finite.
    """
    if isinstance(temperature, str):
        for rule in _RULES:
            if rule == temperature:
                return rule
    number = as_float(temperature)
    if number is None or not 0 < number < math.inf:
        raise ValueError(
            "temperature of a stream must be 'running_median', 'batch_median' or a positive "
            f"float, got {temperature!r}"
        )
    return number


def as_plain_data(temperature: StreamTemperature | None) -> StreamTemperature | None:
    """Return a temperature as a state holds it: a number of a type that any reader knows."""
    return float(temperature) if isinstance(temperature, float) else temperature


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

        While a running median is 0, windows whose losses are all 0 pass: their weights are 1 at
        any temperature, and the median has time to become positive.

        Args:
            losses: (K,) floating, finite, >= 0, not empty.
            position: samples before the window, for messages.

        Raises:
            ValueError: the median is 0, and the window's weights depend on it.
        """
        if not isinstance(self.rule, str):
            return self.rule
        if self.rule == "batch_median":
            median = losses.double().quantile(0.5).item()
        else:
            self._median.update(losses)
            median = self._median_of_all().median()
            if median == 0 and losses.max() == 0:
                return 1.0  # any will do
        if median == 0:
            raise self._zero(f"is 0 up to sample {position + len(losses)} of the stream")
        return median

    def check_end(self) -> None:
        """Raise ValueError if the source has ended and a running median is 0 to the last."""
        median = self._median_of_all()
        if self.rule == "running_median" and median.counts and median.median() == 0:
            raise self._zero("is 0 over the whole stream")

    def _median_of_all(self) -> RunningMedian:
        return self._median + self._median_of_others

    def _zero(self, where: str) -> ValueError:
        return ValueError(
            f"temperature={self.rule!r} {where}: half of the losses are 0; pass a positive float "
            "as temperature, or a larger window if the first losses alone are 0"
        )

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
