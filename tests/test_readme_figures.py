"""What the README says was measured is what the pages say that were made of the runs."""

import re

from benchmarks.forgetting.evidence import CLEAN
from flowdata.report import rule
from tests import test_drift_figures as drift
from tests import test_evidence_figures as evidence
from tests.result_pages import BENCHMARKS, GUIDES, check_section, tables, text

README = BENCHMARKS.parent / "README.md"
WHEN = GUIDES / "when.md"
PAGE = text(BENCHMARKS / "README.md")  # whose figures have tests of their own
PROBES = ("inverted", "noise")
TENTH, THIRD = "wrong10_fashion_mnist", "wrong33_fashion_mnist"


def on_the_page(pattern):
    """The figures of a sentence of the benchmarks' page."""
    (figures,) = re.findall(pattern, PAGE)
    return list(figures)


def off_the_best(rule):
    """How far a rule's choices lie below the best possible, over both studies' targets."""
    of_drift = next(t for t in drift.tables(drift.VISION) if "by drift, inverted" in t)
    both = drift.below_the_best(of_drift), evidence.below_the_best(evidence.cells("choices"))
    return [off for below in both for off in drift.of_rule(below, rule)]


def what_drift_tells():
    with_anchor = drift.tables(drift.VISION)[2]
    of_evidence = drift.tables(drift.EVIDENCE / "forgetting_choices.md")[2]
    signs = [f"cosine, {probe}" for probe in PROBES]
    language = drift.tables(drift.RESULTS / "forgetting_drift_language.md")[0]
    own_text = ("kl, own text", "kl, own text after BOS")
    over_all, within = (
        [
            *evidence.span(
                [
                    end
                    for t in (with_anchor, of_evidence)
                    for end in drift.span(t, *signs, part=part)
                ]
            ),
            *drift.span(language, *own_text, part=part),
        ]
        for part in range(2)
    )
    yield (
        "**Drift tells**: its rank correlation with what was really forgotten is {:.2f} to {:.2f} "
        "for a small image network, over several rates (at one rate {:.2f} to {:.2f}), and {:.2f} "
        "to {:.2f} for text ({:.2f} to {:.2f}).",
        [*over_all[:2], *within[:2], *over_all[2:], *within[2:]],
    )
    least = min(off_the_best("blind"))
    assert least > max(off_the_best("by drift, inverted")), "drift chooses better than validation"
    yield (
        "**Choosing by it**, on `inverted_images` of the network, loses {:.1f} points of old and "
        "new accuracy's average at most (on `smooth_images` {:.1f}), by validation alone {:.0f} to "
        "{:.0f}. For text that chose best: by drift {} to {} of the loss is not learned.",
        [
            *(max(off_the_best(f"by drift, {probe}")) for probe in PROBES),
            *evidence.span(off_the_best("blind")),
            *on_the_page(r"learns ([\d.]+) to ([\d.]+) nats less"),
        ],
    )


def when_weights_help():
    kept, anew = evidence.cells("evidence"), evidence.cells("batch_norm", 1)
    _, low, high = anew["FLOW, statistics anew", TENTH]
    assert low < 0 < high, "which may be chance"
    _, low, high = kept["FLOW", "wrong50_fashion_mnist"]
    assert low < 0 < high, "with half wrong it is open"
    _, *trimming = tables(BENCHMARKS / "results/evidence/forgetting_evidence.md")[1]
    assert {row[3] for row in trimming if row[0] == "4, true share"} == {"holds"}
    of_text, *_ = on_the_page(r"FLOW learns more, by little.\*\* -([\d.]+) \(-([\d.]+) to")
    yield (
        "**Weights help where rows are wrong**: where as much is learned the network keeps {:.1f} "
        "points more with a tenth of the labels wrong, {:.1f} with a third ({:.1f}, perhaps "
        "chance, and {:.1f} with BatchNorm's statistics taken anew). Leaving out as many of the "
        "hardest does as well or better. With half wrong it is open, with none {:.1f} to {:.1f} "
        "points less are kept. For text it is little: {}.",
        [
            *(kept["FLOW", name][0] for name in (TENTH, THIRD)),
            *(anew["FLOW, statistics anew", name][0] for name in (TENTH, THIRD)),
            *evidence.span([-kept["FLOW", name][0] for name in (*CLEAN, evidence.RARE)]),
            of_text,
        ],
    )
    kept_by_anchor, anew_by_anchor = (
        [of[f"output anchor{readout}", name][0] for name in CLEAN]
        for of, readout in ((kept, ""), (anew, ", statistics anew"))
    )
    yield (
        "**Drift can be held**: the output anchor keeps {:.1f} to {:.1f} points more on three of "
        "four sets of right labels ({:.1f} to {:.1f} anew)",
        [*sorted(kept_by_anchor)[1::2], *evidence.span(anew_by_anchor)],
    )


def what_it_costs():
    tokens = on_the_page(r"usual padded loop scores ([\d,]+) tokens/s.*?, flowdata ([\d,]+), and")
    yield (
        "on two cores (Xeon, AMX) a small language model is scored at {1} tokens/s, by the "
        "usual padded loop at {0};",
        tokens,
    )
    steps = on_the_page(r"takes ([\d.]+) \(plain loop\), ([\d.]+) \(Trainer\), ([\d.]+) \(SFT")
    yield "takes {} to {} of a plain one;", evidence.span(steps)
    shares = on_the_page(r"hundredth step takes ([\d.]+) % .*? and ([\d.]+) % of that of ResNet")
    yield "adds {} to {} %.", evidence.span(shares)


def test_every_figure_of_what_was_measured_is_one_of_the_pages():
    fragments = [*what_drift_tells(), *when_weights_help(), *what_it_costs()]
    check_section(README, "What was measured", fragments)


def test_the_advice_of_the_first_lines_is_the_rules():
    kept = evidence.cells("evidence")
    assert all(kept["FLOW", name][0] < 0 for name in (*CLEAN, evidence.RARE))
    first = text(README)
    assert "**Leave the weights out**, not the measuring, where all rows are right" in first
    assert "where all rows are right, leave the weights out" in rule.RIGHT.advice.lower()


def test_the_guide_on_when_says_the_same_of_choosing():
    drift_loses = max(off_the_best("by drift, inverted"))
    low, high = evidence.span(off_the_best("blind"))
    said = f"validation alone loses {low:.0f} to {high:.0f} points, drift {drift_loses:.1f} at most"
    assert said in text(WHEN)


def test_the_guide_on_when_shows_what_the_demo_prints_and_tells_of_no_more():
    printed = (BENCHMARKS / "results" / "demo.md").read_text("utf-8").partition("```\n")[2]
    assert f"```\n{printed}" in WHEN.read_text("utf-8")
    kept = re.findall(r"equal learning: ([+-][\d.]+) of .*? \(([+-][\d.]+) to", printed)
    (mean_weight, low_of_mean), (flow, low), (of_right, low_of_right) = kept
    assert float(low) > 0 > max(float(low_of_mean), float(low_of_right))
    chosen = re.findall(r"^  (?:blind|by drift).*? ([\d.]+) / ([\d.]+) ", printed, re.MULTILINE)
    (blind_new, blind), (drift_new, drift) = [map(float, accuracies) for accuracies in chosen]
    fragments = [
        (
            "**With wrong labels** FLOW keeps a little more of the old task than standard "
            "fine-tuning at equal learning ({} points); giving every sample FLOW's mean weight, "
            "which only makes the steps smaller, does not clearly ({}).",
            [flow[1:], mean_weight[1:]],
        ),
        (
            "**With right labels** it keeps no more ({}): a smaller rate does the same.",
            [of_right.replace("-", "−")],
        ),
        (
            "**What costs most is the rate**: somebody who looks at the new task alone keeps "
            "{:.0f} % of the old one; by drift, which needs no old data either, {:.0f} %, for "
            "{:.0f} points of the new task.",
            [blind, drift, blind_new - drift_new],
        ),
    ]
    check_section(WHEN, "On a small real task, in a minute", fragments)


def test_the_architectures_are_those_of_the_sweep():
    whole, right, unbuilt = on_the_page(r"Of (\d+) arch.*?: (\d+) are right in both.*? of (\d+) no")
    said = f"{right} of {whole} architectures were right, {unbuilt} can't be built small"
    assert said in text(README)
