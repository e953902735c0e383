"""The page that answers: what should I do? Each clause of the rule, with the figure behind it.

A clause was made on sets whose figures were known when it was written, and is checked on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from benchmarks.forgetting.evidence import CLEAN, FLOW, SHARES, WITH_ALL_RIVALS, WITH_SUM
from benchmarks.forgetting.pages.batch_norm import ANEW_PLACE, kept_by
from benchmarks.forgetting.pages.choices import all_rules, of_standard, outcomes
from benchmarks.forgetting.pages.choosing_rules import average
from benchmarks.forgetting.pages.drift import with_all_drifts
from benchmarks.forgetting.pages.fronts import at_equal_learning, kept_on, signed_spread
from benchmarks.forgetting.pages.hard_samples import MEASURES
from benchmarks.forgetting.pages.outcomes import FAILS, HOLDS, above, no_worse, of_all_seeds
from benchmarks.forgetting.pages.several import Studies, counts, of_whole_seeds
from flowdata.report.markdown import spread, table
from flowdata.study import LINEAR_PROBE, STANDARD, Kept, Record
from flowdata.study.runs import records_by
from flowdata.study.table import difference

FIRST, NOISY = ("fashion_mnist", "digits"), ("wrong33_fashion_mnist",)
SUM_AND_PARTS = (f"{FLOW} + l2", FLOW, "l2", STANDARD)
RARE = "rare_fashion_mnist"
AVERAGED = "WiSE-FT, 0.25"
LARGE_RATE = 0.03
_ANEW = "Worded anew when all runs were known"
_NEAR = 3.0  # points below the best possible choice that are near
_SAME = "misjudged20_fashion_mnist"  # the runs of wrong20, but for validation
_SHOWN = {  # as a figure names rules: the one that is judged, its rival, others, the bound
    "": "by drift, inverted",
    "blind ": "blind",
    "smallest rate of all ": "smallest rate of all",
    "new head alone ": LINEAR_PROBE,
    "best possible ": "best possible",
}


@dataclass(frozen=True)
class Clause:
    """One sentence of the rule.

    Attributes:
        says: the sentence.
        figure: what it is judged by, in words.
        made_on: the sets that it was made on.
        checked_on: other sets that it speaks of.
        judge: the runs of a set → the figure, and the outcome.
        methods: a set without all of them says nothing.
    """

    says: str
    figure: str
    made_on: tuple[str, ...]
    checked_on: tuple[str, ...]
    judge: Callable[[list[Record]], tuple[str, str]]
    methods: frozenset[str] = frozenset({STANDARD, FLOW})


def rule_page(studies: Studies) -> str:
    """Return a Markdown page on the rule.

    Args:
        studies: the runs of each set.
    """
    studies = {name: with_all_drifts(records) for name, records in of_whole_seeds(studies).items()}
    lines = [
        "# What should I do?",
        "",
        f"CIFAR-10's ResNet-20 learns other images: {counts(studies)}. Each clause was made on the "
        "sets in bold, whose figures were known when it was worded, and is checked on the others. "
        "Of letters and textures one seed had been seen as well.",
        "",
    ]
    for clause in CLAUSES:
        if rows := list(_rows(clause, studies)):
            lines += [f"## {clause.says}", "", f"{clause.figure}:", ""]
            lines += [*table(["set", "figure", "outcome"], rows, words=("outcome",)), ""]
    return "\n".join(lines)


def _rows(clause: Clause, studies: Studies) -> Iterable[list[str]]:
    for name in (*clause.made_on, *clause.checked_on):
        if clause.methods <= {record["method"] for record in studies.get(name, ())}:
            figure, outcome = clause.judge(studies[name])
            yield [f"**{name}**" if name in clause.made_on else name, figure, outcome]


def _rate_by_drift(records: list[Record]) -> tuple[str, str]:
    """Among standard's rates and a new head alone: near the best possible, better than blind."""
    rules, runs = all_rules(), of_standard(records)
    averages = {name: mean(outcomes(rules[rule], runs)) for name, rule in _SHOWN.items()}
    figure = ", ".join(f"{name}{value:.1f}" for name, value in averages.items())
    by_drift, blind, *_, best = averages.values()
    return figure, HOLDS if by_drift >= best - _NEAR and by_drift > blind else FAILS


def _flow_keeps_more(records: list[Record]) -> tuple[str, str]:
    kept, anew = kept_on(records)[FLOW], kept_by(ANEW_PLACE, records)[FLOW]
    return f"{difference(kept)}, statistics anew {difference(anew)}", above(kept)


def _flow_keeps_no_more(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[FLOW]
    return difference(kept), FAILS if kept.low > 0 else HOLDS


def _averaging_keeps_no_less(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[AVERAGED]
    return difference(kept), no_worse(kept)


def _trimming_does_as_well(records: list[Record]) -> tuple[str, str]:
    """At the true share, against FLOW."""
    share = SHARES[str(records[0]["options"]["target"])]
    kept: Kept = kept_on(records, FLOW)[f"trimmed, {share:.0%}"]
    return difference(kept), no_worse(kept)


def _sum_is_best_at_a_large_rate(records: list[Record]) -> tuple[str, str]:
    at_rate = records_by([r for r in records if r["rate"] == LARGE_RATE], "method")
    averages = {name: spread([average(run) for run in at_rate[name]], 1) for name in SUM_AND_PARTS}
    kept = kept_on(records)[SUM_AND_PARTS[0]]
    figure = ", ".join(f"{name} {value}" for name, value in averages.items())
    of_seeds = zip(*(map(average, at_rate[name]) for name in averages), strict=True)
    leads = [of_sum - max(of_parts) for of_sum, *of_parts in of_seeds]
    return f"{figure}; at equal learning {difference(kept)}", of_all_seeds(leads)


def _hard_rows_gain_less_than_is_lost(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[FLOW]
    offs = {
        name: at_equal_learning(records, FLOW, lambda run, key=key: float(run[key]))
        for name, key in MEASURES.items()
    }
    hardest = [
        mean(run[MEASURES["hardest tenth"]] for run in records if run["method"] == method)
        for method in (FLOW, STANDARD)
    ]
    figure = ", ".join(f"{name} {signed_spread(off)}" for name, off in offs.items())
    figure += f"; at one rate {hardest[0] - hardest[1]:+.1f}; old task {difference(kept)}"
    gain = max(map(mean, offs.values()))
    return figure, HOLDS if gain + kept.difference <= 0 else FAILS


_OTHERS_WRONG = tuple(name for name in SHARES if name not in (*NOISY, _SAME))
_OTHERS_CLEAN = (*(name for name in CLEAN if name not in FIRST), RARE)
CLAUSES = (
    Clause(
        "Choose the rate by drift",
        "Average of new and old accuracy in %, chosen among standard fine-tuning's rates and no "
        "fine-tuning at all, a new head alone, by drift on inverted images; holds within "
        f"{_NEAR:g} points of the best possible and above the blind choice. {_ANEW}",
        (*CLEAN, *NOISY),
        (*_OTHERS_WRONG, _SAME, RARE),
        _rate_by_drift,
    ),
    Clause(
        "All rows right: leave the weights out",
        "What FLOW keeps at equal learning beside standard fine-tuning, in points; holds unless "
        "the interval lies above 0",
        FIRST,
        _OTHERS_CLEAN,
        _flow_keeps_no_more,
    ),
    Clause(
        "All rows right: or average with the model before",
        "What WiSE-FT with a quarter of the fine-tuned weights keeps at equal learning beside "
        "standard fine-tuning, in points; holds unless the interval lies below 0",
        FIRST,
        (),
        _averaging_keeps_no_less,
        frozenset({STANDARD, AVERAGED}),
    ),
    Clause(
        "A tenth of the rows wrong, or more: take the weights",
        "What FLOW keeps at equal learning beside standard fine-tuning, in points, and what with "
        f"BatchNorm's statistics taken anew; holds if the first interval lies above 0. {_ANEW}",
        NOISY,
        _OTHERS_WRONG,
        _flow_keeps_more,
    ),
    Clause(
        "Their share known: trimming does as well",
        "What leaving out the hardest rows, as many as are wrong, keeps at equal learning beside "
        "FLOW, in points; holds if the interval reaches 0",
        NOISY,
        _OTHERS_WRONG,
        _trimming_does_as_well,
    ),
    Clause(
        "A large rate needed: FLOW with ℓ2",
        f"Average of new and old accuracy in % at a rate of {LARGE_RATE:g}, and what the sum keeps "
        "at equal learning beside standard fine-tuning, in points; holds if the sum has the "
        f"largest average on every seed, fails if on none. {_ANEW}",
        WITH_ALL_RIVALS,
        WITH_SUM,
        _sum_is_best_at_a_large_rate,
        frozenset(SUM_AND_PARTS),
    ),
    Clause(
        "Hard rows that are right and matter: leave the weights out as well",
        "FLOW's accuracy less standard fine-tuning's, in points: on the new task's hardest tenth "
        "and worst class at equal learning, on the hardest tenth at the same rates, and what it "
        "keeps of the old task; holds unless the first two gain more than the old task loses. "
        f"{_ANEW}",
        (*FIRST, *_OTHERS_CLEAN),
        (),
        _hard_rows_gain_less_than_is_lost,
    ),
)
