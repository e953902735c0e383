"""The page on the evidence: each method at equal learning on each set, and what was predicted."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping
from statistics import mean

from benchmarks.forgetting.evidence import (
    ANCHOR,
    CLEAN,
    CORE,
    FLOW,
    FLOW_AND_ANCHOR,
    MEAN_WEIGHT,
    SHARES,
    STRENGTHS,
    TARGETS,
)
from benchmarks.forgetting.pages.fronts import (
    Kepts,
    at_equal_learning,
    kept_on,
    signed_spread,
    table_of_sets,
)
from benchmarks.forgetting.pages.hard_samples import MEASURES as HARD
from benchmarks.forgetting.pages.outcomes import (
    FAILS,
    HOLDS,
    above,
    below,
    no_worse,
    of_all_seeds,
    on_the_front,
)
from benchmarks.forgetting.pages.several import Studies, counts, of_whole_seeds
from flowdata.report.markdown import table
from flowdata.study import STANDARD, Kept, Record
from flowdata.study.runs import records_by
from flowdata.study.table import difference

_LARGE_RATE = 0.03  # from which on the readouts of BatchNorm are compared


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has all that the page shows: the core methods, with their readouts."""
    methods = {record["method"] for record in records}
    has_measures = {"readouts", "hits"} <= records[0].keys()
    return has_measures and methods.issuperset(CORE)


def evidence_page(studies: Studies) -> str:
    """Return a Markdown page on the evidence.

    Args:
        studies: the runs of each set; sets of `TARGETS` that are missing are left out.
    """
    studies = of_whole_seeds({name: studies[name] for name in TARGETS if name in studies})
    standard = {name: kept_on(records) for name, records in studies.items()}
    flow = {name: kept_on(records, FLOW) for name, records in studies.items()}
    return "\n".join(
        [
            "# When do weights help beyond a smaller rate?",
            "",
            f"CIFAR-10's ResNet-20 learns other images: {counts(studies)}. What is measured "
            "and what was predicted before the runs: benchmarks/forgetting/registered_evidence.md. "
            "The runs of misjudged20 are those of wrong20, with other validation labels.",
            "",
            "Old accuracy at equal new accuracy, the mean difference from standard fine-tuning in "
            "points, and where 95 % of the draws of seeds and test items lie. A star: p, corrected "
            "by Holm for the methods of the set, is below 0.05. A difference is the mean over the "
            "new accuracies that both methods reach, which other two methods may reach less far. "
            "Each method's front begins at the linear probe, a new head and nothing else:",
            "",
            *table_of_sets(standard, studies),
            "",
            "## What was predicted",
            "",
            "Outcomes go by the intervals above, which are not corrected for the number of tests.",
            "",
            *_outcomes(studies, standard, flow),
            "",
        ]
    )


def _outcomes(studies: Studies, standard: Kepts, flow: Kepts) -> list[str]:
    """A table of the registered predictions, by their numbers."""
    rows = [
        [number, name, figure, outcome]
        for name, records in studies.items()
        for number, figure, outcome in _predicted(name, records, standard[name], flow[name])
    ]
    words = ("set", "figure", "outcome")
    return table(["prediction", *words], rows, words=words)


def _predicted(
    name: str, records: list[Record], kept: Mapping[str, Kept], flow: Mapping[str, Kept]
) -> Iterable[tuple[str, str, str]]:
    """The number of each prediction on a set, the figure that it is judged by, and the outcome."""
    share = SHARES.get(name)
    if share is not None:
        yield "1", difference(kept[FLOW]), above(kept[FLOW])
        true, twice = (flow.get(f"trimmed, {each:.0%}") for each in (share, 2 * share))
        if true is not None:
            yield "4, true share", difference(true), no_worse(true)
        if twice is not None:
            yield "4, twice the share", difference(twice), below(twice)
    else:
        yield "2", difference(kept[FLOW]), _not_above(kept[FLOW])
        for what, key in HARD.items():
            at_rates = _mean_of(records, FLOW, key) - _mean_of(records, STANDARD, key)
            yield f"2, {what}, at one rate", f"{at_rates:+.1f}", HOLDS if at_rates < 0 else FAILS
            off = at_equal_learning(records, FLOW, lambda run, key=key: float(run[key]))
            yield f"2, {what}", signed_spread(off), of_all_seeds([-each for each in off])
    yield "3", difference(kept[MEAN_WEIGHT]), on_the_front(kept[MEAN_WEIGHT])
    if name in CLEAN:
        yield "5", difference(kept[ANCHOR]), above(kept[ANCHOR])
        if STRENGTHS["ℓ2"][1] in kept:
            best = {kind: _best(kept, names) for kind, names in STRENGTHS.items()}
            figure = ", ".join(f"{kind} {value:+.1f}" for kind, value in best.items())
            yield "6", figure, HOLDS if max(best, key=best.__getitem__) == "WiSE-FT" else FAILS
    elif FLOW_AND_ANCHOR in flow:
        yield "5", difference(flow[FLOW_AND_ANCHOR]), no_worse(flow[FLOW_AND_ANCHOR])
    yield from _of_batch_norm(records)


def _not_above(kept: Kept) -> str:
    return FAILS if kept.low > 0 else HOLDS


def _best(kept: Mapping[str, Kept], names: Iterable[str]) -> float:
    return max(kept[name].difference for name in names)


def _mean_of(records: list[Record], method: str, key: str) -> float:
    """The mean over a method's rates and seeds."""
    return mean(record[key] for record in records if record["method"] == method)


def _of_batch_norm(records: list[Record]) -> Iterable[tuple[str, str, str]]:
    """Prediction 7: how far methods lie apart by the old statistics, and by new ones."""
    runs = [record for record in records if record["rate"] >= _LARGE_RATE]
    old = _spread_of_methods(runs, lambda run: next(iter(run["retained"].values())))
    anew = _spread_of_methods(runs, lambda run: run["readouts"]["statistics anew"])
    if not math.isclose(old, 0):
        figure = f"{old:.1f} points apart, {anew:.1f} anew"
        yield "7", figure, HOLDS if anew <= old / 2 else FAILS


def _spread_of_methods(runs: list[Record], accuracy: Callable[[Record], float]) -> float:
    """The largest mean of a method less the smallest, 0 without runs."""
    means = [mean(map(accuracy, of_method)) for of_method in records_by(runs, "method").values()]
    return max(means, default=0.0) - min(means, default=0.0)
