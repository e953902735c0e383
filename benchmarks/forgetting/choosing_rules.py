"""Rules that choose one run of a seed's, as somebody without the old data could, and the best run.

blind                    the best validation score
smallest rate            of the runs nearly as good as it, the smallest rate
least weight distance    of the runs nearly as good as it
least drift              of the runs nearly as good as it
by drift                 `flowdata.drift.choose`
best                     what is worth most for new and old, which takes the old data to know
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import TypeAlias

from flowdata.study import LINEAR_PROBE, Record, choices
from flowdata.study.runs import validation_of, whole_seeds
from flowdata.study.table import measures

Rule: TypeAlias = Callable[[list[Record]], Record]
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
        "by drift": lambda runs: choices(runs)[f"by drift, {probe}"][0],
        "blind": partial(max, key=validation_of),
        "smallest rate": within(lambda run: (run["rate"], -validation_of(run))),
        "least weight distance": within(lambda run: run["rivals"]["weight distance"]),
        "least drift": within(lambda run: run["drift"][probe]["kl"]),
        untrained: lambda runs: next(run for run in runs if run["method"] == untrained),
    }


def outcomes(records: list[Record], rule: Rule) -> list[float]:
    """Return what a rule's choice comes to on each seed: the average of new and old, in %."""
    return [average(run) for run in choose(records, rule)]


def choose(records: list[Record], rule: Rule) -> list[Record]:
    """Return the run that a rule chooses on each seed whose runs are all there."""
    return [rule(runs) for runs in whole_seeds(records).values()]


def _least(cost: Callable[[Record], object], slack: float) -> Rule:
    """The rule that takes the least cost among the runs whose validation is good enough."""

    def rule(runs: list[Record]) -> Record:
        best = max(map(validation_of, runs))
        good = [run for run in runs if validation_of(run) >= best - slack]
        return min(good, key=cost)  # type: ignore[arg-type]

    return rule
