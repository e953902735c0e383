"""What somebody without the old data would choose among a study's runs, by each rule.

blind        the highest validation score, whatever it cost
by drift     validation weighed against the drift on a probe (flowdata.drift.choose)
best         the highest average of old and new, which takes the old data to know
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from functools import partial
from typing import TypeAlias

from flowdata.drift import Drift, rank
from flowdata.study.runs import Record, records_by, validation_of

Rule: TypeAlias = Callable[[list[Record]], Record]


def choices(
    records: Iterable[Record],
    average: Callable[[Record], float] | None = None,
    *,
    exchange: float = 1.0,
) -> dict[str, list[Record]]:
    """Return the run that each rule chooses among all methods and rates, one for each seed.

    Args:
        records: of one study. Those of language models have −loss as their validation score, or
            an accuracy.
        average: record -> what the best run has most of; None leaves that rule out.
        exchange: see `flowdata.drift.rank`.

    Returns:
        By the rule's name, in the order of the seeds. Without drifts in the records there are no
        rules by drift.
    """
    records = list(records)
    rules: dict[str, Rule] = {"blind": lambda runs: max(runs, key=validation_of)}
    for probe in records[0].get("drift", {}) if records else {}:
        rules[f"by drift, {probe}"] = partial(_by_drift, probe=probe, exchange=exchange)
    if average is not None:
        rules["best"] = lambda runs: max(runs, key=average)
    by_seed = records_by(records, "seed")
    return {name: [rule(runs) for runs in by_seed.values()] for name, rule in rules.items()}


def _by_drift(runs: list[Record], probe: str, exchange: float) -> Record:
    drifts = [Drift(**run["drift"][probe]) for run in runs]
    best = max(map(validation_of, runs))
    is_loss = drifts[0].of == "tokens" and best <= 0
    # All scores of a study come of one function, so that one above 1 says that all are in %.
    unit = -1 if is_loss else 100 if best > 1 else 1
    candidates = rank(
        [
            (str(place), validation_of(run) / unit, drift)
            for place, (run, drift) in enumerate(zip(runs, drifts, strict=True))
        ],
        validation="loss" if is_loss else "accuracy",
        exchange=exchange,
    )
    return runs[int(candidates[0].name)]
