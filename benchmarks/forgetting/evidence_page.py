"""The page on the evidence: each method at equal learning on each set, and what was predicted."""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping
from statistics import mean

from benchmarks.forgetting.evidence import CLEAN, SHARES, TARGETS
from flowdata.study import (
    LINEAR_PROBE,
    STANDARD,
    Kept,
    Record,
    kept_at_equal_learning,
    runs_with_items,
)
from flowdata.study.table import count, row

Studies = Mapping[str, list[Record]]  # the runs of each set
Kepts = Mapping[str, Mapping[str, Kept]]  # by set and method
_FLOW, _MEAN_WEIGHT, _ANCHOR, _BOTH = (
    "FLOW",
    "standard, smaller steps",
    "output anchor",
    "FLOW + output anchor",
)
_STRENGTHS = {
    "ℓ2": ("l2", "l2, 0.03", "l2, 0.1"),
    "WiSE-FT": ("WiSE-FT, 0.25", "WiSE-FT", "WiSE-FT, 0.75"),
    "LoRA": ("LoRA, rank 2", "LoRA", "LoRA, rank 32"),
}
_LARGE_RATE = 0.03  # from which on the readouts of BatchNorm are compared
_HOLDS, _FAILS, _OPEN = "holds", "fails", "open"


def whole_seeds(records: Iterable[Record]) -> list[Record]:
    """Return the runs of the seeds that have as many runs as any other."""
    of_seed: dict[int, list[Record]] = {}
    for record in records:
        of_seed.setdefault(record["seed"], []).append(record)
    most = max(map(len, of_seed.values()))
    return [record for runs in of_seed.values() if len(runs) == most for record in runs]


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has all that the page shows: the core methods, with their readouts."""
    methods = {record["method"] for record in records}
    has_measures = {"readouts", "hits"} <= records[0].keys()
    return has_measures and {LINEAR_PROBE, STANDARD, _FLOW, _MEAN_WEIGHT, _ANCHOR} <= methods


def kept_on(records: list[Record], reference: str = STANDARD) -> dict[str, Kept]:
    """Return what each method keeps at equal learning on one set, by method."""
    kept = kept_at_equal_learning(runs_with_items(records), reference, LINEAR_PROBE)
    return {each.method: each for each in kept}


def evidence_page(studies: Studies) -> str:
    """Return a Markdown page on the evidence.

    Args:
        studies: the runs of each set; sets of `TARGETS` that are missing are left out.
    """
    studies = {name: whole_seeds(studies[name]) for name in TARGETS if name in studies}
    standard = {name: kept_on(records) for name, records in studies.items()}
    flow = {name: kept_on(records, _FLOW) for name, records in studies.items()}
    seeds = ", ".join(
        f"{name} {count(len({r['seed'] for r in records}), 'seed')}"
        for name, records in studies.items()
    )
    return "\n".join(
        [
            "# When do weights help beyond a smaller rate?",
            "",
            f"CIFAR-10's ResNet-20 learns other images: {seeds}. What is measured and what was "
            "predicted before the runs: benchmarks/forgetting/registered_evidence.md.",
            "",
            "Old accuracy at equal new accuracy, the mean difference from standard fine-tuning in "
            "points, and where 95 % of the draws of seeds and test items lie:",
            "",
            *_table(standard),
            "",
            "## What was predicted",
            "",
            *_outcomes(studies, standard, flow),
            "",
        ]
    )


def _table(all_kept: Kepts) -> list[str]:
    methods = list(dict.fromkeys(name for of_set in all_kept.values() for name in of_set))
    methods.remove(STANDARD)
    lines = [row(["method", *all_kept]), row(["---", *["---:"] * len(all_kept)])]
    for method in methods:
        cells = [_cell(of_set.get(method)) for of_set in all_kept.values()]
        lines.append(row([method, *cells]))
    return lines


def _cell(kept: Kept | None) -> str:
    if kept is None:
        return "–"
    return f"{kept.difference:+.1f} ({kept.low:+.1f} to {kept.high:+.1f})"


def _outcomes(studies: Studies, standard: Kepts, flow: Kepts) -> list[str]:
    """A table of the registered predictions, by their numbers."""
    lines = [row(["prediction", "set", "figure", "outcome"]), row(["---"] * 4)]
    for name, records in studies.items():
        kept, against_flow = standard[name], flow[name]
        for number, figure, outcome in _predicted(name, records, kept, against_flow):
            lines.append(row([number, name, figure, outcome]))
    return lines


def _predicted(
    name: str, records: list[Record], kept: Mapping[str, Kept], flow: Mapping[str, Kept]
) -> Iterable[tuple[str, str, str]]:
    """The number of each prediction on a set, the figure that it is judged by, and the outcome."""
    share = SHARES.get(name)
    if share is not None:
        yield "1", _cell(kept[_FLOW]), above(kept[_FLOW])
        true, twice = (flow.get(f"trimmed, {each:.0%}") for each in (share, 2 * share))
        if true is not None:
            yield "4, true share", _cell(true), no_worse(true)
        if twice is not None:
            yield "4, twice the share", _cell(twice), below(twice)
    else:
        yield "2", _cell(kept[_FLOW]), _not_above(kept[_FLOW])
        hardest = _hardest_tenth(records, _FLOW) - _hardest_tenth(records, STANDARD)
        yield "2, hardest tenth", f"{hardest:+.1f}", _HOLDS if hardest < 0 else _FAILS
    yield "3", _cell(kept[_MEAN_WEIGHT]), on_the_front(kept[_MEAN_WEIGHT])
    if name in CLEAN:
        yield "5", _cell(kept[_ANCHOR]), above(kept[_ANCHOR])
        if _STRENGTHS["ℓ2"][1] in kept:
            best = {kind: _best(kept, names) for kind, names in _STRENGTHS.items()}
            figure = ", ".join(f"{kind} {value:+.1f}" for kind, value in best.items())
            yield "6", figure, _HOLDS if max(best, key=best.__getitem__) == "WiSE-FT" else _FAILS
    elif _BOTH in flow:
        yield "5", _cell(flow[_BOTH]), no_worse(flow[_BOTH])
    yield from _of_batch_norm(records)


def above(kept: Kept) -> str:
    """Return whether a method is better than the reference, as far as the interval tells."""
    return _HOLDS if kept.low > 0 else _FAILS if kept.high < 0 else _OPEN


def below(kept: Kept) -> str:
    """Return whether a method is worse than the reference, as far as the interval tells."""
    return _HOLDS if kept.high < 0 else _FAILS if kept.low > 0 else _OPEN


def no_worse(kept: Kept) -> str:
    """Return whether a method is at least as good: its interval reaches 0 or lies above."""
    return _HOLDS if kept.high >= 0 else _FAILS


def _not_above(kept: Kept) -> str:
    return _FAILS if kept.low > 0 else _HOLDS


def on_the_front(kept: Kept) -> str:
    """Return whether a method lies on the reference's own front: its interval holds 0."""
    return _HOLDS if kept.low <= 0 <= kept.high else _FAILS


def _best(kept: Mapping[str, Kept], names: Iterable[str]) -> float:
    return max(kept[name].difference for name in names)


def _hardest_tenth(records: list[Record], method: str) -> float:
    """The accuracy on the new task's hardest tenth, the mean over rates and seeds."""
    return mean(r["target of the hardest tenth"] for r in records if r["method"] == method)


def _of_batch_norm(records: list[Record]) -> Iterable[tuple[str, str, str]]:
    """Prediction 7: how far methods lie apart by the old statistics, and by new ones."""
    at_large = [r for r in records if r["rate"] >= _LARGE_RATE]
    methods = {r["method"] for r in at_large}
    means = {
        method: [
            mean(values)
            for values in zip(
                *(
                    (next(iter(r["retained"].values())), r["readouts"]["statistics anew"])
                    for r in at_large
                    if r["method"] == method
                ),
                strict=True,
            )
        ]
        for method in methods
    }
    if len(means) > 1:
        old, anew = (max(part) - min(part) for part in zip(*means.values(), strict=True))
        if not math.isclose(old, 0):
            figure = f"{old:.1f} points apart, {anew:.1f} anew"
            yield "7", figure, _HOLDS if anew <= old / 2 else _FAILS
