"""The page that answers: what should I do? Each clause of the rule, with the figure behind it.

A clause was made on sets whose figures were known when it was written, and is checked on others.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from statistics import mean

from benchmarks.forgetting.evidence import CLEAN, FLOW, SHARES, WITH_ALL_RIVALS, WITH_SUM
from benchmarks.forgetting.pages.choices import all_rules, outcomes
from benchmarks.forgetting.pages.choosing_rules import average
from benchmarks.forgetting.pages.drift import with_all_drifts
from benchmarks.forgetting.pages.fronts import at_equal_learning, kept_on, signed_spread
from benchmarks.forgetting.pages.outcomes import FAILS, HOLDS, above, no_worse
from benchmarks.forgetting.pages.several import Studies, counts, of_whole_seeds
from flowdata.report.markdown import spread, table
from flowdata.study import STANDARD, Kept, Record
from flowdata.study.runs import records_by
from flowdata.study.table import difference

FIRST, NOISY = ("fashion_mnist", "digits"), ("wrong33_fashion_mnist",)
SUM_AND_PARTS = (f"{FLOW} + l2", FLOW, "l2", STANDARD)
RARE = "rare_fashion_mnist"
LARGE_RATE = 0.03
_NEAR = 3.0  # points below the best possible choice that are near
_GAIN = 2.0  # points that would be worth having
_SAME = "misjudged20_fashion_mnist"  # the runs of wrong20, but for validation
_BY_DRIFT, _BEST, _BLIND = "by drift, inverted", "best possible", "blind"


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
        "sets in bold, whose figures were known from earlier studies, and is checked on the "
        "others. Of letters and textures one seed had been seen as well.",
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
    """Among the rates of standard fine-tuning: near the best possible, and better than blind."""
    runs = [record for record in records if record["method"] == STANDARD]
    by_drift, best, blind = (
        outcomes(all_rules()[name], runs) for name in (_BY_DRIFT, _BEST, _BLIND)
    )
    figure = f"{mean(by_drift):.1f}, blind {mean(blind):.1f}, best possible {mean(best):.1f}"
    holds = mean(by_drift) >= mean(best) - _NEAR and mean(by_drift) > mean(blind)
    return figure, HOLDS if holds else FAILS


def _flow_keeps_more(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[FLOW]
    return difference(kept), above(kept)


def _flow_keeps_no_more(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[FLOW]
    return difference(kept), FAILS if kept.low > 0 else HOLDS


def _trimming_does_as_well(records: list[Record]) -> tuple[str, str]:
    """At the true share, against FLOW."""
    share = SHARES[str(records[0]["options"]["target"])]
    kept: Kept = kept_on(records, FLOW)[f"trimmed, {share:.0%}"]
    return difference(kept), no_worse(kept)


def _sum_is_best_at_a_large_rate(records: list[Record]) -> tuple[str, str]:
    at_rate = records_by([r for r in records if r["rate"] == LARGE_RATE], "method")
    averages = {name: spread([average(run) for run in at_rate[name]], 1) for name in SUM_AND_PARTS}
    figure = ", ".join(f"{name} {value}" for name, value in averages.items())
    first, *others = (mean(average(run) for run in at_rate[name]) for name in averages)
    return figure, HOLDS if first > max(others) else FAILS


def _hard_rows_gain_nothing(records: list[Record]) -> tuple[str, str]:
    kept = kept_on(records)[FLOW]
    off = at_equal_learning(records, FLOW, lambda run: float(run["target of the worst class"]))
    hardest = [
        mean(run["target of the hardest tenth"] for run in records if run["method"] == method)
        for method in (FLOW, STANDARD)
    ]
    figure = f"{signed_spread(off)}, {hardest[0] - hardest[1]:+.1f}"
    return figure, FAILS if kept.low > 0 or mean(off) >= _GAIN else HOLDS


_OTHERS_WRONG = tuple(name for name in SHARES if name not in (*NOISY, _SAME))
_OTHERS_CLEAN = (*(name for name in CLEAN if name not in FIRST), RARE)
CLAUSES = (
    Clause(
        "Choose the rate by drift",
        "Average of new and old accuracy in %, chosen among standard fine-tuning's rates by drift "
        f"on inverted images; holds within {_NEAR:g} points of the best possible and above the "
        "blind choice",
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
        "A tenth of the rows wrong, or more: take the weights",
        "What FLOW keeps at equal learning beside standard fine-tuning, in points; holds if the "
        "interval lies above 0",
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
        f"Average of new and old accuracy in % at a rate of {LARGE_RATE:g}; holds if the sum has "
        "the largest",
        WITH_ALL_RIVALS,
        WITH_SUM,
        _sum_is_best_at_a_large_rate,
        frozenset(SUM_AND_PARTS),
    ),
    Clause(
        "Hard rows that are right and matter: leave the weights out as well",
        "FLOW's accuracy on the new task's worst class less standard fine-tuning's at equal "
        "learning, and on the hardest tenth at the same rates, in points; holds unless FLOW keeps "
        f"more, as above, or the worst class gains {_GAIN:g}",
        FIRST,
        _OTHERS_CLEAN,
        _hard_rows_gain_nothing,
    ),
)
