"""What might tell forgetting, run by run: drift on each probe, and its rivals."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from statistics import mean

from flowdata.report.markdown import table
from flowdata.study import Record
from flowdata.study.extras import load_extra
from flowdata.study.runs import records_by

OF_DRIFT = ("kl", "cosine", "agreement")


def signs(record: Record, drift: str = "drift") -> dict[str, float]:
    """Return what says that a run has forgotten, by name; more of each says that more is lost.

    Args:
        record: of a study whose records have a drift.
        drift: the record's entry that has the drifts by the names of their probes.
    """
    values = {
        f"{name}, {probe}": (1 if name == "kl" else -1) * measures[name]
        for probe, measures in record[drift].items()
        for name in OF_DRIFT
    }
    return values | record.get("rivals", {})


def agreement_with(
    records: list[Record],
    lost: Callable[[Record], float],
    drift: str = "drift",
    largest_rate: float = math.inf,
) -> dict[str, tuple[float, float]]:
    """Return Spearman's coefficient of each sign with what was truly lost.

    Args:
        records: runs of one study.
        lost: record → what was truly lost, more for a run that forgot more.
        drift: see `signs`.
        largest_rate: of the rates within which runs are compared.

    Returns:
        By sign, over all runs, and the mean of those within one rate (with five runs or more).
    """
    by_rate = records_by(records, "rate")
    groups = [
        group for rate, group in by_rate.items() if 0 < rate <= largest_rate and len(group) >= 5
    ]

    def coefficient(runs: list[Record], name: str) -> float:
        return _spearman([signs(run, drift)[name] for run in runs], list(map(lost, runs)))

    coefficients = {}
    for name in signs(records[0], drift):
        within = [coefficient(group, name) for group in groups]
        coefficients[name] = coefficient(records, name), mean(within or [math.nan])
    return coefficients


def agreement_table(columns: Mapping[str, Mapping[str, tuple[float, float]]]) -> list[str]:
    """Return the lines of a Markdown table of coefficients, a row for each sign.

    Args:
        columns: what `agreement_with` returned, by heading.
    """
    signs = next(iter(columns.values()))
    rows = [
        [sign, *("{:.2f} / {:.2f}".format(*each[sign]) for each in columns.values())]
        for sign in signs
    ]
    return table(["sign", *columns], rows)


def _spearman(sign: Sequence[float], truth: Sequence[float]) -> float:
    stats = load_extra("scipy.stats", "coefficients of drift")
    return float(stats.spearmanr(sign, truth).statistic)


def few_samples(
    records: list[Record], lost: Callable[[Record], float]
) -> Mapping[str, Mapping[str, dict[str, float]]]:
    """Return Spearman's coefficients over all runs by the number of the probe's samples.

    Returns:
        By probe, by number of samples, by measure of the drift.
    """
    truth = [lost(record) for record in records]

    def coefficient(probe: str, size: str, name: str) -> float:
        sign = [record["drift on few"][probe][size][name] for record in records]
        return abs(_spearman(sign, truth))

    return {
        probe: {size: {name: coefficient(probe, size, name) for name in OF_DRIFT} for size in sizes}
        for probe, sizes in records[0]["drift on few"].items()
    }
