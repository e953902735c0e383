"""Rules that choose one run of a seed's, as somebody without the old data could, and the best run.

blind                    the best validation score
smallest rate            of the runs nearly as good as it, the smallest rate
least weight distance    of the runs nearly as good as it
least drift              of the runs nearly as good as it
by drift                 validation weighed against the drift (`flowdata.drift.choose`)
best possible            what is worth most for new and old, which takes the old data to know
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial

from flowdata.study import LINEAR_PROBE, Record
from flowdata.study.choices import Rule, blind, by_drift
from flowdata.study.runs import validation_of
from flowdata.study.table import measures

POINTS = 5.0  # of validation accuracy that the rivals may give away


def average(record: Record) -> float:
    """Return the average of a run's accuracies on the new and the old task, in %."""
    return measures(record)["average"]


def rules(
    probe: str,
    *,
    worth: Callable[[Record], float] = average,
    slack: float = POINTS,
    untrained: str = LINEAR_PROBE,
) -> dict[str, Rule]:
    """Return the rules by name.

    Args:
        probe: the name of the drift to choose by.
        worth: what the best possible run has most of.
        slack: the validation score that a run may have less than the best, and be nearly as good.
        untrained: the method that doesn't train.
    """
    within = partial(_least, slack=slack)
    return {
        "best possible": partial(max, key=worth),
        "by drift": partial(by_drift, probe=probe),
        "blind": blind,
        "smallest rate": within(lambda run: (run["rate"], -validation_of(run))),
        "least weight distance": within(lambda run: run["rivals"]["weight distance"]),
        "least drift": within(lambda run: run["drift"][probe]["kl"]),
        untrained: lambda runs: next(run for run in runs if run["method"] == untrained),
    }


def _least(cost: Callable[[Record], object], slack: float) -> Rule:
    """The rule that takes the least cost among the runs whose validation is good enough."""

    def rule(runs: list[Record]) -> Record:
        best = max(map(validation_of, runs))
        good = [run for run in runs if validation_of(run) >= best - slack]
        return min(good, key=cost)  # type: ignore[arg-type]

    return rule
