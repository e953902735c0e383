"""The rule of the report rests on the figures of the page on it."""

import re

import pytest

from flowdata.report import rule
from tests import test_evidence_figures as evidence
from tests.result_pages import BENCHMARKS, RESULTS

PAGE = (RESULTS / "evidence" / "forgetting_rule.md").read_text("utf-8")


def section(title):
    """The rows under a heading: (set, whether the clause was made on it, figure, outcome)."""
    text = PAGE.partition(f"## {title}")[2].partition("\n## ")[0]
    line = r"^\| (\**)(\w+)\** \| (.*) \| (holds|fails|open) \|$"
    rows = re.findall(line, text, re.MULTILINE)
    return [(name, bool(mark), figure, outcome) for mark, name, figure, outcome in rows]


def numbers(figure):
    return [float(number) for number in re.findall(r"[+-]?\d+\.\d", figure)]


def outcomes(rows):
    """How many sets hold, for a sentence: of all, and of those that the clause was not made on."""
    new = [outcome == "holds" for _, is_known, _, outcome in rows if not is_known]
    known = [outcome == "holds" for _, is_known, _, outcome in rows if is_known]
    on_new = f", {sum(new)} of {len(new)} others" if new else "; checked on no others"
    return f"held on {sum(known)} of {len(known)} sets known before{on_new}"


def rate():
    rows = section("Choose the rate by drift")
    averages = [numbers(figure) for _, _, figure, _ in rows]
    near, far, smallest = (
        [best - values[place] for *values, best in averages] for place in range(3)
    )
    return (
        "Chosen by drift, a new head alone being a choice too, the average of new and old accuracy "
        f"was {max(near):.1f} points below the best possible at most; chosen by validation alone "
        f"{min(far):.0f} to {max(far):.0f}, at the smallest rate tried {min(smallest):.0f} to "
        f"{max(smallest):.0f} ({outcomes(rows)})."
    )


def span(values):
    return f"{min(values):+.1f} to {max(values):+.1f} points"


def differences(rows, place=0):
    return span([numbers(figure)[place] for _, _, figure, _ in rows])


def right():
    rows = section("All rows right: leave")
    return f"FLOW kept {differences(rows)} beside plain fine-tuning ({outcomes(rows)})."


def average():
    rows = section("All rows right: or average")
    return (
        f"With a quarter of the fine-tuned weights it kept {differences(rows)} beside plain "
        f"fine-tuning ({outcomes(rows)})."
    )


def wrong():
    rows = section("A tenth of the rows wrong")
    (half,) = [numbers(row[2])[0] for row in rows if row[0].startswith("wrong50")]
    few = [row for row in rows if not row[0].startswith("wrong50")]
    anew = differences(few, 3).removesuffix(" points")
    return (
        f"FLOW kept {differences(few)} beside plain fine-tuning where a tenth to a third were "
        f"wrong, {anew} with BatchNorm's statistics taken anew, {half:+.1f} where half were "
        f"({outcomes(rows)})."
    )


def share():
    rows = section("Their share known")
    of_flow, of_trimming = map(span, evidence.hardest_of_wrong())
    return (
        f"Trimming kept {differences(rows)} beside FLOW; at equal learning the new task's hardest "
        f"tenth was {of_trimming} beside plain fine-tuning's, FLOW's "
        f"{of_flow.removesuffix(' points')} ({outcomes(rows)})."
    )


def hard():
    rows = section("Hard rows")
    # The hardest tenth and the worst class with their deviations, then as they are.
    hardest, _, worst, _, at_rate, old, *_ = zip(*(numbers(row[2]) for row in rows), strict=True)
    worst, old, at_rate = (span(each).removesuffix(" points") for each in (worst, old, at_rate))
    return (
        f"At equal learning FLOW's hardest tenth was {span(hardest)} beside plain fine-tuning's, "
        f"its worst class {worst}, the old task {old}; at the same rates the hardest tenth "
        f"{at_rate} ({outcomes(rows)})."
    )


def large():
    rows = section("A large rate needed")
    figures = [numbers(row[2]) for row in rows]
    gains = [of_sum - plain for of_sum, *_, plain, _, _, _, _ in figures]
    equal = span([kept for *_, kept, _, _ in figures]).removesuffix(" points")
    return (
        f"At a rate of 0.03 the average of new and old accuracy was {span(gains)} beside plain "
        f"fine-tuning's; at equal learning the old task {equal} (above its parts on every seed: "
        f"{outcomes(rows)})."
    )


@pytest.mark.parametrize("clause", ["rate", "right", "average", "wrong", "share", "hard", "large"])
def test_a_clause_has_the_figure_of_the_page(clause):
    assert getattr(rule, clause.upper()).figure == globals()[clause]()


def test_the_guide_and_the_benchmarks_tell_the_rule_as_the_report_does():
    guide = (BENCHMARKS.parent / "examples" / "guides" / "when.md").read_text("utf-8")
    words = " ".join(guide.split())
    for clause in rule.RULE:
        assert clause.advice in words
        assert clause.figure in words
