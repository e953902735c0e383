"""The rule of the report rests on the figures of the page on it."""

import re

import pytest

from flowdata.report import rule
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
    return (
        f"held on {sum(known)} of {len(known)} sets known before, {sum(new)} of {len(new)} others"
    )


def rate():
    rows = section("Choose the rate by drift")
    averages = [numbers(figure) for _, _, figure, _ in rows]
    near = [best - by_drift for by_drift, _, best in averages]
    far = [best - blind for _, blind, best in averages]
    return (
        f"Chosen by drift the average of new and old accuracy was {max(near):.1f} points below the "
        f"best possible at most, chosen by validation alone {min(far):.0f} to {max(far):.0f} "
        f"({outcomes(rows)})."
    )


def span(values):
    return f"{min(values):+.1f} to {max(values):+.1f} points"


def differences(rows):
    return span([numbers(figure)[0] for _, _, figure, _ in rows])


def right():
    rows = section("All rows right")
    return f"FLOW kept {differences(rows)} beside plain fine-tuning ({outcomes(rows)})."


def wrong():
    rows = section("A tenth of the rows wrong")
    (half,) = [numbers(row[2])[0] for row in rows if row[0].startswith("wrong50")]
    few = [row for row in rows if not row[0].startswith("wrong50")]
    return (
        f"FLOW kept {differences(few)} beside plain fine-tuning where a tenth to a third were "
        f"wrong, {half:+.1f} where half were ({outcomes(rows)})."
    )


def share():
    rows = section("Their share known")
    return f"Trimming kept {differences(rows)} beside FLOW ({outcomes(rows)})."


def hard():
    rows = section("Hard rows")
    worst, hardest = ([numbers(row[2])[place] for row in rows] for place in (0, -1))
    return (
        f"FLOW's worst class was {span(worst)} beside plain fine-tuning's at equal learning, its "
        f"hardest tenth {span(hardest)} at the same rates ({outcomes(rows)})."
    )


def large():
    rows = section("A large rate needed")
    gains = [of_sum - plain for of_sum, *_, plain, _ in (numbers(row[2]) for row in rows)]
    return (
        f"At a rate of 0.03 the average of new and old accuracy was {min(gains):+.1f} to "
        f"{max(gains):+.1f} points beside plain fine-tuning's, and above that of weights and ℓ2 "
        f"alone ({outcomes(rows)})."
    )


@pytest.mark.parametrize("clause", ["rate", "right", "wrong", "share", "hard", "large"])
def test_a_clause_has_the_figure_of_the_page(clause):
    assert getattr(rule, clause.upper()).figure == globals()[clause]()


def test_the_guide_and_the_benchmarks_tell_the_rule_as_the_report_does():
    guide = (BENCHMARKS.parent / "examples" / "guides" / "when.md").read_text("utf-8")
    words = " ".join(guide.split())
    for clause in rule.RULE:
        assert clause.advice in words
        assert clause.figure in words
