"""Methods at equal learning on several sets, side by side."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean

import numpy as np

from benchmarks.forgetting.pages.several import Studies, table_of_studies
from flowdata.report.markdown import spread
from flowdata.study import (
    LINEAR_PROBE,
    STANDARD,
    Kept,
    Record,
    kept_at_equal_learning,
    runs_with_items,
)
from flowdata.study.equal_learning import Items
from flowdata.study.runs import records_by
from flowdata.study.table import difference

_SIGNIFICANT = 0.05  # p

Kepts = Mapping[str, Mapping[str, Kept]]  # by set and method


def kept_on(
    records: list[Record],
    reference: str = STANDARD,
    old: Callable[[Record], float] | None = None,
) -> dict[str, Kept]:
    """Return what each method keeps at equal learning on one set, by method.

    Args:
        records: runs of the set on the same seeds.
        reference: the method that the others are compared with.
        old: record → the old accuracy by another readout, in %, of which no items are known, so
            that the interval is that of seeds alone; None takes the items of the study's own.
    """
    runs = runs_with_items(records)
    if old is not None:
        for record in records:
            of_rate = runs[record["method"], record["rate"]]
            new = of_rate[record["seed"]].new
            of_rate[record["seed"]] = Items(new, np.array([old(record)]))
    kept = kept_at_equal_learning(runs, reference, LINEAR_PROBE)
    return {each.method: each for each in kept}


def at_equal_learning(
    records: list[Record], method: str, value: Callable[[Record], float]
) -> list[float]:
    """Return how far a value lies from standard fine-tuning's at equal learning, for each seed.

    Between two rates the value is a straight line over the new accuracy. The difference is the
    mean over the levels of it that both methods reach, from the linear probe on.

    Args:
        records: runs of one set, with both methods and the linear probe on each seed.
        method: the method.
        value: record → the value.
    """
    differences = []
    for of_seed in records_by(records, "seed").values():
        lines = [_line(of_seed, name, value) for name in (method, STANDARD)]
        start, end = lines[0][0, 0], min(line[:, 0].max() for line in lines)
        levels = np.linspace(start, max(start, end), 21)
        ours, theirs = (np.interp(levels, *line.T) for line in lines)
        differences.append(float((ours - theirs).mean()))
    return differences


def signed_spread(differences: list[float]) -> str:
    """Return differences of the seeds in a cell: the mean with its sign ± standard deviation."""
    return ("+" if mean(differences) >= 0 else "") + spread(differences, 1)


def _line(records: list[Record], method: str, value: Callable[[Record], float]) -> np.ndarray:
    """The (new accuracy, value) of the probe and of a method's rates up to where it learns most."""
    runs = [run for run in records if run["method"] in (method, LINEAR_PROBE)]
    points = np.array([(mean(run["target"].values()), value(run)) for run in runs])
    points = points[np.argsort([run["rate"] for run in runs], kind="stable")]
    points = points[: points[:, 0].argmax() + 1]
    return points[points[:, 0].argsort(kind="stable")]


def table_of_sets(all_kept: Kepts, studies: Studies) -> list[str]:
    """Return a Markdown table of the differences from standard fine-tuning, a column for each set.

    A star marks those whose p, corrected for the number of methods of the set, is below 0.05.
    """
    methods = list(dict.fromkeys(name for of_set in all_kept.values() for name in of_set))
    methods.remove(STANDARD)
    rows = []
    for method in methods:
        of_sets = [of_set.get(method) for of_set in all_kept.values()]
        rows.append([method, *("–" if each is None else _starred(each) for each in of_sets)])
    return table_of_studies("method", studies, rows)


def _starred(kept: Kept) -> str:
    return difference(kept) + "*" * (kept.p < _SIGNIFICANT)
