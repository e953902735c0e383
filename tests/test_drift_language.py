"""What the records of a study of language say of drift, on made-up records whose answer is known."""

import pytest

from benchmarks.forgetting import drift_language as page

PROBE = "own text"
BEFORE = {"WikiText-2 nll": 3.0, "code nll": 2.0}


def record(method, rate, seed, *, loss, kl, wikitext, distance):
    drift = {"kl": kl, "reverse_kl": kl, "cosine": 1 - kl / 9, "agreement": 1 - kl / 3}
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "validation": -loss,
        "target": {"nll": loss},
        "retained": {"WikiText-2 nll": 3.0 + wikitext, "code nll": 2.0 + 2 * wikitext},
        "drift": {PROBE: {**drift, "samples": 8, "head": "own", "of": "tokens"}},
        "drift on few": {PROBE: {"4": drift}},
        "rivals": {"weight distance": distance, "validation loss": loss, "gradient norm": 2 * loss},
    }


# KL follows forgetting in order; the weights' distance, and the loss, don't.
RUNS = [
    ("standard", 1e-4, {"loss": 1.00, "kl": 0.01, "wikitext": 0.01, "distance": 1.0}),
    ("standard", 1e-3, {"loss": 0.90, "kl": 0.90, "wikitext": 1.20, "distance": 5.0}),
    ("FLOW", 1e-4, {"loss": 1.05, "kl": 0.02, "wikitext": 0.015, "distance": 0.5}),
    ("FLOW", 1e-3, {"loss": 0.94, "kl": 0.30, "wikitext": 0.20, "distance": 6.0}),
]


def study(seeds=(0, 1)):
    before = {"loss": 1.5, "kl": 0.0, "wikitext": 0.0, "distance": 0.0}
    runs = [("pre-trained", 0.0, before), *RUNS]
    return [record(name, rate, seed, **v) for seed in seeds for name, rate, v in runs]


def test_forgetting_is_the_rise_over_the_pre_trained_model():
    records = study()
    rises = page.rises(records[2], records)
    assert rises == pytest.approx({"WikiText-2": 1.2, "code": 2.4})
    with pytest.raises(ValueError, match="no 'pre-trained' model to compare with"):
        page.rises(records[2], records[1:3])


def test_a_measure_in_the_order_of_forgetting_has_a_correlation_of_1():
    values = page.telling(study())
    assert values["KL, own text"]["WikiText-2"] == pytest.approx(1)
    assert values["KL, own text, first 4"]["code"] == pytest.approx(1)
    assert values["1 − cosine, own text"]["code, one rate"] == pytest.approx(1)
    distance = values["weight distance"]
    assert distance["WikiText-2"] == pytest.approx(0.6)
    assert distance["WikiText-2, one rate"] == pytest.approx(-1)
    assert values["validation loss"]["WikiText-2"] == pytest.approx(-0.8)


def test_each_rule_chooses_its_run():
    chosen = {
        name: [(r["method"], r["rate"]) for r in runs] for name, runs in page.rules(study()).items()
    }
    assert chosen == {
        "blind": [("standard", 1e-3)] * 2,
        "by drift, own text": [("standard", 1e-4)] * 2,
        "smallest rate within 0.05 nats": [("standard", 1e-3)] * 2,
        "least weight distance within 0.05 nats": [("standard", 1e-3)] * 2,
        "best possible": [("standard", 1e-4)] * 2,
    }  # fmt: skip


def test_the_page_says_both_and_what_was_forgotten():
    lines = page.page(study())
    assert "| KL, own text | 1.00 | 1.00 | 1.00 | 1.00 |" in lines
    assert "| blind | standard 0.001 | 0.900 | +1.200 | +2.400 |" in lines
    assert "| by drift, own text | standard 0.0001 | 1.000 | +0.010 | +0.020 |" in lines
    assert lines.count("Standard fine-tuning, chosen by:") == 1
