"""What the README says was measured is what the pages say that were made of the runs."""

import re

from benchmarks.forgetting.evidence import CLEAN
from tests import test_drift_figures as drift
from tests import test_evidence_figures as evidence
from tests.result_pages import BENCHMARKS, check_section, tables, text

README = BENCHMARKS.parent / "README.md"
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
    spans = drift.span(with_anchor, *signs), drift.span(of_evidence, *signs)
    language = drift.tables(drift.RESULTS / "forgetting_drift_language.md")[0]
    yield (
        "is {:.2f} to {:.2f} for images (cosine), {:.2f} to {:.2f} for text",
        [
            *(min(low for low, _ in spans), max(high for _, high in spans)),
            *drift.span(language, "kl, own text", "kl, own text after BOS"),
        ],
    )
    yield (
        "loses {:.1f} points against the best possible choice at most (smooth ones up to {:.1f}), "
        "the validation score alone {:.0f} to {:.0f}.",
        [
            *(max(off_the_best(f"by drift, {probe}")) for probe in PROBES),
            *evidence.span(off_the_best("blind")),
        ],
    )
    yield (
        "it learns {} to {} nats less",
        on_the_page(r"learns ([\d.]+) to ([\d.]+) nats less than the best"),
    )


def when_weights_help():
    kept, anew = evidence.cells("evidence"), evidence.cells("batch_norm", 1)
    yield (
        "{:+.1f} points of the old task's accuracy with a tenth of the labels wrong, {:+.1f} with "
        "a third, … ({:+.1f} and {:+.1f} with BatchNorm's … right it is {:+.1f} to {:+.1f}.",
        [
            *(kept["FLOW", name][0] for name in (TENTH, THIRD)),
            *(anew["FLOW, statistics anew", name][0] for name in (TENTH, THIRD)),
            *evidence.span([kept["FLOW", name][0] for name in (*CLEAN, evidence.RARE)]),
        ],
    )
    _, low, high = kept["FLOW", "wrong50_fashion_mnist"]
    assert low < 0 < high  # "with half of them wrong it is open"
    _, *trimming = tables(BENCHMARKS / "results/evidence/forgetting_evidence.md")[1]
    assert {row[3] for row in trimming if row[0] == "4, true share"} == {"holds"}
    kept_by_anchor, anew_by_anchor = (
        [of[f"output anchor{readout}", name][0] for name in CLEAN]
        for of, readout in ((kept, ""), (anew, ", statistics anew"))
    )
    yield (
        "keeps {:.1f} to {:.1f} points more on three of four clean sets ({:.1f} to {:.1f} anew)",
        [*sorted(kept_by_anchor)[1::2], *evidence.span(anew_by_anchor)],
    )


def what_it_costs():
    tokens = on_the_page(r"usual padded loop scores ([\d,]+) tokens/s.*?, flowdata ([\d,]+), and")
    yield "runs at {1} tokens/s where the usual padded loop has {0};", tokens
    steps = on_the_page(r"takes ([\d.]+) \(plain loop\), ([\d.]+) \(Trainer\), ([\d.]+) \(SFT")
    yield "takes {} to {} of a plain one;", evidence.span(steps)
    shares = on_the_page(r"hundredth step takes ([\d.]+) % .*? and ([\d.]+) % of that of ResNet")
    yield "adds {} to {} %.", evidence.span(shares)


def test_every_figure_of_what_was_measured_is_one_of_the_pages():
    fragments = [*what_drift_tells(), *when_weights_help(), *what_it_costs()]
    check_section(README, "What was measured", fragments, ["on two CPU cores"])


def test_the_guide_on_when_says_the_same_of_choosing():
    drift_loses = max(off_the_best("by drift, inverted"))
    low, high = evidence.span(off_the_best("blind"))
    said = f"validation alone loses {low:.0f} to {high:.0f} points, drift {drift_loses:.1f} at most"
    assert said in text(README.parent / "examples" / "guides" / "when.md")


def test_the_architectures_are_those_of_the_sweep():
    whole, right, unbuilt = on_the_page(r"Of (\d+) arch.*?: (\d+) are right in both.*? of (\d+) no")
    said = f"{right} of {whole} architectures were right, {unbuilt} can't be built small"
    assert said in text(README)
