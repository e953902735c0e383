"""The page on drift in language, on made-up records whose answer is known."""

import pytest

from benchmarks.forgetting.pages import drift_language as page

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
    assert page.rise(records, "WikiText-2")(records[2]) == pytest.approx(1.2)
    assert page.rise(records, "code")(records[2]) == pytest.approx(2.4)
    assert page.can_tell(records)
    assert not page.can_tell(records[1:5])
    of_one_rate = [record for record in records if record["rate"] < 1e-3]
    assert not page.can_tell(of_one_rate)  # nothing is there to choose


def test_each_rule_chooses_its_run_and_the_page_says_what_it_forgot():
    lines = page.drift_page({"mine": study()}).split("\n")
    of_all = lines[lines.index("mine, all methods:") :]
    assert of_all[4:11] == [
        "| best possible | standard 0.0001 | 1.000 | +0.010 (+0.010) | +0.020 (+0.020) |",
        "| by drift | standard 0.0001 | 1.000 | +0.010 (+0.010) | +0.020 (+0.020) |",
        "| blind | standard 0.001 | 0.900 | +1.200 (+1.200) | +2.400 (+2.400) |",
        "| smallest rate | standard 0.001 | 0.900 | +1.200 (+1.200) | +2.400 (+2.400) |",
        "| least weight distance | standard 0.001 | 0.900 | +1.200 (+1.200) | +2.400 (+2.400) |",
        "| least drift | FLOW 0.001 | 0.940 | +0.200 (+0.200) | +0.400 (+0.400) |",
        "| pre-trained | pre-trained 0 | 1.500 | +0.000 (+0.000) | +0.000 (+0.000) |",
    ]


def test_a_sign_in_the_order_of_what_was_lost_has_coefficient_one():
    lines = page.drift_page({"mine": study()}).split("\n")
    cells = {line.split(" | ")[0].strip("| "): line.strip("| ").split(" | ")[1:] for line in lines}
    assert cells["kl, own text"] == ["1.00 / nan", "1.00 / nan"]  # no rate has five runs
    assert cells["weight distance"] == ["0.60 / nan", "0.60 / nan"]
    assert cells["validation loss"] == ["-0.80 / nan", "-0.80 / nan"]
    assert cells["own text"] == ["4", "1.000"]


def test_runs_that_lower_the_loss_have_no_part_in_the_order_of_those_that_forgot():
    lower = {"loss": 1.02, "kl": 0.8, "wikitext": -0.02, "distance": 1.0}
    records = [*study(), *(record("WiSE-FT", 1e-4, seed, **lower) for seed in (0, 1))]
    lines = page.drift_page({"mine": records}).splitlines()
    (all_runs,), (rises,) = (
        [line for line in lines if line.startswith("| kl, own text") and part in line]
        for part in ("0.4", "1.00")
    )
    assert lines.index(all_runs) < lines.index(rises)
    assert "mine, WikiText-2 (8 runs)" in lines[lines.index(rises) - 2]
    nothing_lost = [r for r in records if r["method"] in ("pre-trained", "WiSE-FT", "standard")]
    for each in nothing_lost:
        each["retained"] = BEFORE
    assert "Too few." in page.drift_page({"mine": nothing_lost})
