"""Rules that choose one run of a seed's, as somebody without the old data could, and the best run.

blind                    the best validation score
smallest rate            of the runs within five points of it, the smallest rate
least weight distance    of the runs within five points of it
least drift              of the runs within five points of it
by drift                 `flowdata.drift.choose`
best                     the best average of new and old, which takes the old data to know
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from statistics import mean, stdev
from typing import TypeAlias

from benchmarks.forgetting.drift_measures import runs_by
from flowdata.study import Record, choices
from flowdata.study.runs import validation_of
from flowdata.study.table import measures

Rule: TypeAlias = Callable[[list[Record]], Record]
POINTS = 5.0  # of validation accuracy that the rivals may give away


def average(record: Record) -> float:
    """Return the average of a run's accuracies on the new and the old task, in %."""
    return measures(record)["average"]


def rules(probe: str) -> dict[str, Rule]:
    """Return the rules by name.

    Args:
        probe: the name of the drift to choose by.
    """
    return {
        "best possible": partial(max, key=average),
        "by drift": lambda runs: choices(runs)[f"by drift, {probe}"][0],
        "blind": partial(max, key=validation_of),
        "smallest rate": _within(lambda run: (run["rate"], -validation_of(run))),
        "least weight distance": _within(lambda run: run["rivals"]["weight distance"]),
        "least drift": _within(lambda run: run["drift"][probe]["kl"]),
        "linear probe": lambda runs: next(run for run in runs if run["method"] == "linear probe"),
    }


def outcomes(records: list[Record], rule: Rule) -> list[float]:
    """Return what a rule's choice comes to on each seed: the average of new and old, in %."""
    return [average(rule(runs)) for runs in runs_by(records, "seed").values()]


def spread(values: list[float]) -> str:
    """Return mean ± standard deviation."""
    return f"{mean(values):.1f}" + (f" ± {stdev(values):.1f}" if len(values) > 1 else "")


def _within(cost: Callable[[Record], object]) -> Rule:
    """The rule that takes the least cost among the runs whose validation is good enough."""

    def rule(runs: list[Record]) -> Record:
        best = max(map(validation_of, runs))
        good = [run for run in runs if validation_of(run) >= best - POINTS]
        return min(good, key=cost)  # type: ignore[arg-type]

    return rule
