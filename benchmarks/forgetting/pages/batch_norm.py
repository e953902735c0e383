"""The page that answers: how much of what is forgotten is BatchNorm's old statistics?

A fine-tuned body can be read for the old task with the statistics that BatchNorm had before, with
statistics taken anew on old images, or with a head fitted anew on top of that.
"""

from __future__ import annotations

import math
from functools import partial
from statistics import mean

from benchmarks.forgetting.evidence import ANCHOR, FLOW, MEAN_WEIGHT
from benchmarks.forgetting.pages.fronts import kept_on
from benchmarks.forgetting.pages.several import (
    Studies,
    counts,
    of_whole_seeds,
    table_by_rate,
    table_of_studies,
)
from flowdata.study import LINEAR_PROBE, STANDARD, Kept, Record
from flowdata.study.table import difference

ANEW, HEAD = "statistics anew", "head anew"
ANEW_PLACE = 1  # of the ways to read the old task, as `old_accuracies` has them
FIXED = (f"{STANDARD}, BatchNorm fixed", f"{FLOW}, BatchNorm fixed")


def batch_norm_page(studies: Studies) -> str:
    """Return a Markdown page on the readouts of the old task.

    Args:
        studies: the runs of each set, with readouts.
    """
    studies = of_whole_seeds(studies)
    return "\n".join(
        [
            "# How much of what is forgotten is BatchNorm's old statistics?",
            "",
            f"CIFAR-10's ResNet-20 learns other images: {counts(studies)}. CIFAR-10's accuracy in "
            "%, means over the seeds: with BatchNorm's old statistics, as all other pages have it "
            "/ with statistics taken anew on 1,000 old images / with a head fitted anew as well. "
            "The last two take old data, which nobody has who asks what is forgotten.",
            "",
            *table_by_rate(studies, (LINEAR_PROBE, STANDARD, FLOW, *FIXED), _cell),
            "",
            "At equal learning, the difference from standard fine-tuning in points, by each of the "
            "three, and where 95 % of the draws lie (of seeds and items; where statistics are "
            "taken anew, of seeds alone). Rates at which a run diverged, so that no head can be "
            "fitted, are left out:",
            "",
            *_differences(studies),
            "",
        ]
    )


def old_accuracies(record: Record) -> tuple[float, ...]:
    """Return a run's accuracy on the old task in %, by each of the three ways to read it."""
    old = next(iter(record["retained"].values()))
    return old, *(record["readouts"].get(name, float("nan")) for name in (ANEW, HEAD))


def kept_by(place: int, records: list[Record]) -> dict[str, Kept]:
    """Return what methods keep at equal learning, by one of the ways to read the old task.

    Args:
        place: of the way in `old_accuracies`.
        records: runs of one set; methods at rates that diverged are left out.
    """
    return kept_on(_finite(records), old=partial(_by, place) if place else None)


def _cell(runs: list[Record]) -> str:
    means = map(mean, zip(*map(old_accuracies, runs), strict=True))
    # No head is fitted to a body that diverged.
    return " / ".join("–" if math.isnan(value) else f"{value:.1f}" for value in means)


def _differences(studies: Studies) -> list[str]:
    rows = []
    for place, name in enumerate(("old statistics", ANEW, HEAD)):
        kept = {each: kept_by(place, records) for each, records in studies.items()}
        for method in (FLOW, MEAN_WEIGHT, ANCHOR, *FIXED):
            cells = (of_set.get(method) for of_set in kept.values())
            rows.append(
                [f"{method}, {name}", *("–" if c is None else difference(c) for c in cells)]
            )
    return table_of_studies("method, readout", studies, rows)


def _by(place: int, record: Record) -> float:
    return old_accuracies(record)[place]


def _finite(records: list[Record]) -> list[Record]:
    """The runs of those methods and rates that a head could be fitted to on every seed."""
    lacking = {(r["method"], r["rate"]) for r in records if HEAD not in r["readouts"]}
    return [r for r in records if (r["method"], r["rate"]) not in lacking]
