"""What somebody without the old data would choose among a study's runs, by each rule.

blind        the highest validation score, whatever it cost
by drift     validation weighed against the drift on a probe (flowdata.drift.choose)
best         the highest average of old and new, which takes the old data to know

A rule chooses among all methods and rates of one seed. A seed that lacks runs, as the last one of
a study that goes on does, is left out: there a rule would have fewer to choose from.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Sequence
from functools import partial
from typing import TypeAlias

from flowdata.drift import Drift, rank
from flowdata.study.records import Record
from flowdata.study.runs import finite_or_last, validation_of, whole_seeds

Rule: TypeAlias = Callable[[list[Record]], Record]  # the runs of a seed → one of them


def choices(
    records: Iterable[Record],
    average: Callable[[Record], float] | None = None,
    *,
    exchange: float = 1.0,
) -> dict[str, list[Record]]:
    """Return the run that each rule chooses among all methods and rates, one for each whole seed.

    Args:
        records: of one study. Their validation score is −loss or an accuracy. A seed with fewer
            runs than another one is left out.
        average: record -> what the best run has most of; None leaves that rule out.
        exchange: see `flowdata.drift.rank`.

    Returns:
        By the rule's name, in the order of the seeds. Without drifts in the records there are no
        rules by drift.

    Raises:
        ValueError: all runs of a seed diverged, validation scores are neither accuracies nor
            −loss, or see `flowdata.drift.rank`.
    """
    records = list(records)
    return {
        name: on_whole_seeds(rule, records)
        for name, rule in rules(records, average, exchange).items()
    }


def rules(
    records: Sequence[Record],
    average: Callable[[Record], float] | None = None,
    exchange: float = 1.0,
) -> dict[str, Rule]:
    """Return the rules of `choices`, by name; the arguments are its own."""
    by_name: dict[str, Rule] = {"blind": blind}
    for probe in records[0].get("drift", {}) if records else {}:
        by_name[f"by drift, {probe}"] = partial(by_drift, probe=probe, exchange=exchange)
    if average is not None:
        by_name["best"] = partial(max, key=lambda run: finite_or_last(average(run)))
    return by_name


def on_whole_seeds(rule: Rule, records: Iterable[Record]) -> list[Record]:
    """Return the run that a rule chooses on each seed whose runs are all there, in their order."""
    return [rule(runs) for runs in whole_seeds(records).values()]


def blind(runs: list[Record]) -> Record:
    """Return the run with the highest validation score, whatever it cost."""
    return max(runs, key=validation_of)


def by_drift(runs: list[Record], probe: str, exchange: float = 1.0) -> Record:
    """Return the run that `flowdata.drift.rank` puts first.

    Args:
        runs: see `choices`.
        probe: the name of the drift to weigh validation against.
        exchange: see `flowdata.drift.rank`.
    """
    drifts = [Drift(**run["drift"][probe]) for run in runs]
    scores = list(map(validation_of, runs))
    best, worst = max(scores), min(filter(math.isfinite, scores), default=0.0)
    is_loss = best <= 0
    if worst < 0 < best:
        raise ValueError(
            "validation scores must be accuracies, 0 or more each, or −loss, 0 or less each; got "
            f"{worst:g} beside {best:g}"
        )
    # All scores of a study come of one function, so that one above 1 says that all are in %.
    unit = -1 if is_loss else 100 if best > 1 else 1
    candidates = rank(
        [
            (str(place), score / unit, drift)
            for place, (score, drift) in enumerate(zip(scores, drifts, strict=True))
        ],
        validation="loss" if is_loss else "accuracy",
        exchange=exchange,
    )
    return runs[int(candidates[0].name)]
