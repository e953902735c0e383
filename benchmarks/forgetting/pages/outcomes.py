"""Outcomes of predictions, judged by the interval of a difference."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Protocol

HOLDS, FAILS, OPEN = "holds", "fails", "open"


class Interval(Protocol):
    """The ends of an interval in which a difference lies; above 0 is better."""

    @property
    def low(self) -> float: ...  # noqa: D102

    @property
    def high(self) -> float: ...  # noqa: D102


def above(difference: Interval) -> str:
    """Return whether a method is better than the reference, as far as the interval tells."""
    return HOLDS if difference.low > 0 else FAILS if difference.high < 0 else OPEN


def below(difference: Interval) -> str:
    """Return whether a method is worse than the reference, as far as the interval tells."""
    return HOLDS if difference.high < 0 else FAILS if difference.low > 0 else OPEN


def no_worse(difference: Interval) -> str:
    """Return whether a method is at least as good: its interval reaches 0 or lies above."""
    return HOLDS if difference.high >= 0 else FAILS


def on_the_front(difference: Interval) -> str:
    """Return whether a method does as the reference does: its interval holds 0."""
    return HOLDS if difference.low <= 0 <= difference.high else FAILS


def of_all_seeds(differences: Sequence[float]) -> str:
    """Return whether a difference lies above 0 on every seed, below 0 on every seed, or neither.

    Args:
        differences: one for each seed.
    """
    if all(each > 0 for each in differences):
        return HOLDS
    return FAILS if all(each < 0 for each in differences) else OPEN
