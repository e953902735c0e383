"""The evidence in language: what is run, and its page, on losses that are known."""

import argparse

import numpy as np
import pytest

from benchmarks.forgetting import evidence_language, language, methods, texts
from benchmarks.forgetting.pages import evidence_language as pages
from flowdata.study.equal_learning import Items, differences


def test_only_what_is_missing_is_run(tmp_path, monkeypatch):
    runs = []

    class Task:
        def __init__(self, model, assets, sizes, scores):
            self.data = sizes.data

        def run(self, method, rate, seed):
            runs.append((self.data, method, rate, seed))
            return {"validation": 1.0, "target": {"nll": 1.0}, "retained": {}}

    monkeypatch.setattr(evidence_language, "Language", Task)
    parser = argparse.ArgumentParser()
    evidence_language.add_options(parser)
    options = parser.parse_args(["--model", "m.gguf", "--results", str(tmp_path)])
    evidence_language.study(options)
    assert {seed for data, *_, seed in runs if data == "noisy"} == set(range(8))
    assert {method for data, method, *_ in runs if data == "gsm8k"} >= {"TALR", "DFT", "EAFT"}
    assert {rate for _, method, rate, _ in runs if method != "pre-trained"} == {1e-4}
    before = len(runs)
    evidence_language.study(options)
    assert len(runs) == before


def test_clean_rows_are_those_that_noise_left_alone():
    rows = [{"question": "?", "answer": " ".join("abcdefgh")} for _ in range(9)]
    noisy = texts.noisy(rows, seed=0)
    weights = methods.clean_rows(range(9))
    assert [w > 0 for w in weights.tolist()] == [row == rows[0] for row in noisy]
    assert weights.mean() == pytest.approx(1)
    assert "clean rows alone" in language.ALL


def test_the_whole_text_is_cut_without_a_rest():
    text = " = One = \n" + "a" * 3100 + "\n = Two = \n" + "b" * 20
    pieces = texts.whole(text)
    assert "".join(pieces) == text
    assert max(map(len, pieces)) <= texts.HELD_OUT_PIECE


def record(method, seed, new, old, kl):
    noise = np.random.default_rng(seed).normal(0, 0.01, (2, 60))
    losses = {"target": (new + noise[0]).tolist(), "WikiText-2": (old + noise[1]).tolist()}
    drift = {"own text": {"kl": kl, "cosine": 1 - kl, "agreement": 1 - kl}}
    return {
        "method": method,
        "rate": 0.0 if method == "pre-trained" else 1e-4,
        "seed": seed,
        "item_losses": losses,
        "drift": drift,
        "target": {"nll": new},
    }


@pytest.fixture(scope="module")
def page():
    losses = {
        "pre-trained": (1.5, 3.0, 0.0),
        "standard": (1.0, 2.95, 0.15),
        "FLOW": (0.9, 2.94, 0.1),
        "standard, smaller steps": (1.0, 2.95, 0.15),
        "trimmed, 33%": (0.9, 2.94, 0.1),
        "clean rows alone": (0.8, 2.94, 0.1),
        "EAFT": (1.2, 3.1, 0.3),
        "TALR": (1.3, 3.2, 0.4),
    }
    records = [record(name, seed, *of) for name, of in losses.items() for seed in (0, 1)]
    assert pages.can_tell(records)
    return pages.evidence_page({"SmolLM2 on noisy": records})


def test_predictions_are_judged_by_their_figures(page):
    outcomes = {line.split(" | ")[0]: line for line in page.splitlines()}
    for name in ("8, test loss", "8, WikiText-2", "9", "10", "11", "12, EAFT, test loss"):
        assert outcomes[f"| {name}"].endswith("| holds |"), name
    assert "+0.1500 nats | holds" in outcomes["| 12, EAFT, drift"]
    assert "-0.100 (-0.1" in outcomes["| 8, test loss"]
    order = [line for line in outcomes if line.startswith("| 12")]
    assert [line.split(", ")[1] for line in order] == ["TALR", "TALR", "EAFT", "EAFT"]


def test_the_page_says_how_well_drift_tells_within_the_one_rate(page):
    (line,) = [line for line in page.splitlines() if line.startswith("Spearman")]
    assert "over the 14 runs of this one rate: own text 0.9" in line


def test_a_study_without_predictions_has_a_part_for_each_rate():
    records = [
        {**record(name, seed, new, 3.0, kl), "rate": rate}
        for seed in (0, 1)
        for name, rate, new, kl in (
            ("pre-trained", 0.0, 1.5, 0.0),
            ("standard", 1e-4, 1.0, 0.1),
            ("standard", 1e-3, 1.2, 0.4),
            ("FLOW", 1e-4, 0.9, 0.1),
            ("FLOW", 1e-3, 1.3, 0.5),
        )
    ]
    lines = pages.evidence_page({"gsm8k": records}).splitlines()
    places = [lines.index(f"## gsm8k, at a rate of {rate}") for rate in ("0.0001", "0.001")]
    parts = lines[places[0] : places[1]], lines[places[1] :]
    for part, cell in zip(parts, ("| -0.100 (-0.100", "| +0.100 (+0.100"), strict=True):
        (flow,) = [line for line in part if line.startswith("| FLOW")]
        assert cell in flow
        assert any(line.startswith("| pre-trained") for line in part)
    assert "predicted:" not in "".join(lines)


def test_differences_are_those_of_means_paired_by_seed_and_item():
    random = np.random.default_rng(0)
    base = {seed: Items(random.normal(size=40), random.normal(size=30)) for seed in (0, 1)}
    better = {seed: Items(items.new + 0.5, items.old - 0.25) for seed, items in base.items()}
    (new, old) = differences({("a", 1.0): base, ("b", 1.0): better}, "a")["b"]
    assert (new.low, new.difference, new.high) == pytest.approx((0.5, 0.5, 0.5))
    assert old.difference == pytest.approx(-0.25)
    assert new.p < 0.01
    assert differences({("a", 1.0): base}, "a") == {}
    with pytest.raises(ValueError, match="several rates"):
        differences({("a", 1.0): base, ("a", 2.0): better}, "a")
    with pytest.raises(ValueError, match="no 'c'"):
        differences({("a", 1.0): base}, "c")
