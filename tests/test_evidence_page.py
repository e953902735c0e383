"""The pages on the evidence: their figures and outcomes, on runs whose answers are known."""

import re

import numpy as np
import pytest
import torch

from benchmarks.forgetting.evidence import methods
from benchmarks.forgetting.pages import evidence as evidence_page
from benchmarks.forgetting.pages.batch_norm import batch_norm_page
from benchmarks.forgetting.pages.choices import choices_page
from benchmarks.forgetting.pages.fronts import at_equal_learning
from benchmarks.forgetting.pages.hard_samples import hard_samples_page
from benchmarks.forgetting.pages.rule import rule_page
from flowdata.study import Kept, packed

RATES = {0.0: 0, 0.001: 0.25, 0.003: 0.5, 0.01: 0.75, 0.03: 1.0, 0.1: 1.0}


def answers(percent):
    return torch.from_numpy(np.arange(400) < 4 * percent)


def run(name, method, rate, seed):
    """Methods learn 20 points and lose 40; those that help lose 10 less, at the same learning."""
    helps = {"FLOW": "wrong" in name, "output anchor": True}.get(method, False)
    step = RATES[rate] * (0.5 if method == "standard, smaller steps" else 1)
    new, old = answers(60 + 20 * step), answers(80 - (30 if helps else 40) * step)
    accuracies = [100 * each.double().mean().item() for each in (new, old)]
    cosine = 1 - (80 - accuracies[1]) / 160
    drift = dict.fromkeys(("kl", "reverse_kl"), 1 - cosine)
    drift |= {"cosine": cosine, "agreement": cosine, "samples": 9, "head": "frozen", "of": "items"}
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "options": {"target": name},
        "validation": accuracies[0],
        "target": {"accuracy": accuracies[0]},
        "retained": {"CIFAR-10 accuracy": accuracies[1]},
        "readouts": {"statistics anew": 70 + accuracies[1] / 100, "head anew": 79.0},
        "target of the hardest tenth": 30.0 - 10 * (method == "FLOW"),
        "target of the worst class": accuracies[0] - 20,
        "drift": dict.fromkeys(("noise", "new task"), drift),
        "drift on other probes": {"inverted": drift},
        "hits": {"target": packed(new), "retained": packed(old)},
    }


@pytest.fixture(scope="module")
def studies():
    studies = {
        name: [
            run(name, method, rate, seed)
            for method, rates in methods(name).items()
            for rate in rates
            for seed in (0, 1)
        ]
        for name in ("wrong20_fashion_mnist", "letters")
    }
    studies["letters"].append(run("letters", "standard", 0.01, 2))  # of a seed just begun
    return studies


@pytest.fixture(scope="module")
def page(studies):
    return evidence_page.evidence_page(studies)


def test_what_was_predicted_is_judged_by_its_figure(page):
    lines = {tuple(line.split(" | ")[:2]): line for line in page.splitlines()}
    noisy, clean = "wrong20_fashion_mnist", "letters"
    assert lines["| 1", noisy].endswith("| holds |")
    assert "+" in lines["| 1", noisy]
    assert lines["| 2", clean].endswith("| holds |")
    assert "| -10.0 | holds |" in lines["| 2, hardest tenth, at one rate", clean]
    assert lines["| 2, hardest tenth", clean].endswith("| holds |")
    assert lines["| 2, worst class", clean].endswith("| open |")
    for name in (noisy, clean):
        assert lines["| 3", name].endswith("| holds |")
        assert lines["| 7", name].endswith("| holds |")
    assert lines["| 5", clean].endswith("| holds |")
    # Trimming is standard fine-tuning here, and so worse than FLOW.
    assert lines["| 4, true share", noisy].endswith("| fails |")


def test_runs_without_the_core_methods_have_no_such_page():
    runs = [run("letters", method, 0.01, 0) for method in ("standard", "linear probe")]
    assert not evidence_page.can_tell(runs)
    every = [run("letters", method, 0.01, 0) for method in methods("letters")]
    assert evidence_page.can_tell(every)


def test_the_seeds_that_are_whole_count(page):
    assert re.search(r"letters \(\d+ runs, 2 seeds\)", page)


@pytest.mark.parametrize(
    ("low", "high", "outcomes"),
    [
        (1, 2, ("holds", "fails", "holds", "fails")),
        (-2, -1, ("fails", "holds", "fails", "fails")),
        (-1, 1, ("open", "open", "holds", "holds")),
    ],
)
def test_an_interval_tells(low, high, outcomes):
    kept = Kept((low + high) / 2, low, high, 0.5, "FLOW", 4, 5, ())
    judges = ("above", "below", "no_worse", "on_the_front")
    assert tuple(getattr(evidence_page, judge)(kept) for judge in judges) == outcomes


def cells(page, row):
    """The cells of the last row of a page that begins so."""
    return [line for line in page.splitlines() if line.startswith(f"| {row} |")][-1].split(" | ")


def test_each_readout_of_batch_norm_is_compared_at_equal_learning(studies):
    page = batch_norm_page(studies)
    assert cells(page, "standard, 0.01")[1:] == ["50.0 / 70.5 / 79.0", "50.0 / 70.5 / 79.0 |"]
    assert cells(page, "FLOW, old statistics")[1].startswith("+5.0 (")
    assert cells(page, "FLOW, statistics anew")[1].startswith("+0.1 (")
    assert cells(page, "FLOW, head anew")[1:] == ["+0.0 (+0.0 to +0.0)", "+0.0 (+0.0 to +0.0) |"]


def test_hard_samples_are_compared_at_one_rate_and_at_equal_learning(studies):
    page = hard_samples_page(studies)
    assert cells(page, "FLOW, 0.01")[1] == "75.0 / 20.0 / 55.0"
    assert cells(page, "FLOW, hardest tenth")[1] == "-8.6 ± 0.0"  # from the probe's 30 on
    assert cells(page, "FLOW, worst class")[1] == "+0.0 ± 0.0"


def test_a_value_at_equal_learning_is_a_line_between_rates(studies):
    def old(record):
        return record["retained"]["CIFAR-10 accuracy"]

    (first, _) = at_equal_learning(studies["wrong20_fashion_mnist"], "FLOW", old)
    assert first == pytest.approx(5.0)  # of 80 − 30 x against 80 − 40 x, the mean over x


def test_drift_that_tells_chooses_the_best_run(studies):
    page = choices_page(studies)
    best = cells(page.partition("Among the rates")[0], "best possible")[1:]
    assert cells(page.partition("Among the rates")[0], "by drift, noise")[1:] == best
    assert cells(page, "kl, inverted")[1].startswith("1.00")


def test_each_clause_of_the_rule_is_judged_on_every_set_it_speaks_of(studies):
    sections = dict(part.split("\n\n", 1) for part in rule_page(studies).split("\n## ")[1:])
    outcomes = {
        title: dict(re.findall(r"^\| (\w+) \| .* \| (holds|fails|open) \|$", text, re.M))
        for title, text in sections.items()
    }
    noisy, clean = "wrong20_fashion_mnist", "letters"
    assert outcomes["All rows right: leave the weights out"] == {clean: "holds"}
    assert outcomes["A tenth of the rows wrong, or more: take the weights"] == {noisy: "holds"}
    # Trimming is standard fine-tuning here, and so is FLOW with ℓ2; FLOW is where rows are right.
    assert outcomes["Their share known: trimming does as well"] == {noisy: "fails"}
    assert outcomes["A large rate needed: FLOW with ℓ2"] == {noisy: "fails", clean: "open"}
    hard = "Hard rows that are right and matter: leave the weights out as well"
    assert f"| **{clean}** | hardest tenth -8.6 ± 0.0, worst class +0.0 ± 0.0; " in sections[hard]
    assert sections[hard].count("| holds |") == 1
    assert len(sections) == 6
    assert f"| **{clean}** |" in sections["Choose the rate by drift"]
    assert f"| {noisy} |" in sections["Choose the rate by drift"]
