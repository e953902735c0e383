"""The page on drift: coefficients, rules and images, on runs whose answers are known."""

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from benchmarks.forgetting.made_images import TEXTURES, letters, textures
from benchmarks.forgetting.pages import choosing_rules, drift_measures
from benchmarks.forgetting.pages import drift as drift_page
from benchmarks.forgetting.readouts import retake_statistics
from flowdata.drift import DriftMeter
from flowdata.report.pictures import png
from flowdata.study import hits, packed, unpacked
from flowdata.study.choices import on_whole_seeds


def answers(percent):
    return packed(torch.arange(200) < 2 * percent)


def run(method, rate, seed, *, new, old, kl, distance):
    """A record as the study of vision writes it."""
    drift = {"kl": kl, "reverse_kl": kl, "cosine": 1 - kl / 10, "agreement": old / 100}
    of_probes = {"new task": drift | {"samples": 9, "head": "frozen", "of": "samples"}}
    return {
        "method": method,
        "rate": rate,
        "seed": seed,
        "validation": new,
        "target": {"accuracy": new},
        "retained": {drift_page.OLD: old},
        "readouts": {"own BatchNorm": old},
        "hits": {"target": answers(new), "retained": answers(old)},
        "drift": of_probes,
        "drift by own BatchNorm": of_probes,
        "drift on other probes": dict.fromkeys(("noise", "inverted"), of_probes["new task"]),
        "drift on few": {"new task": {"16": drift, "32": drift}},
        "rivals": {"weight distance": distance, "validation loss": 1.0, "gradient norm": kl**2},
    }


@pytest.fixture
def records():
    return [
        each
        for seed in (0, 1)
        for each in (
            run("linear probe", 0.0, seed, new=60, old=80, kl=0.0, distance=0.0),
            run("standard", 0.01, seed, new=84, old=50, kl=2.0, distance=2.0),
            run("standard", 0.03, seed, new=88, old=20 + seed, kl=4.0 - seed / 10, distance=3.0),
            run("FLOW", 0.01, seed, new=85, old=70, kl=1.0, distance=2.5),
            run("FLOW", 0.03, seed, new=86, old=40, kl=3.0, distance=3.5),
        )
    ]


def test_a_sign_in_the_order_of_what_was_lost_has_coefficient_one(records):
    table = drift_measures.agreement_with(records, lambda r: -r["retained"][drift_page.OLD])
    assert table["kl, new task"][0] == pytest.approx(1)
    assert table["weight distance"][0] < 1
    assert np.isnan(table["kl, new task"][1])  # no rate has five runs


def test_every_rule_chooses_what_it_says(records):
    rules = choosing_rules.rules("new task")
    first = [record for record in records if record["seed"] == 0]
    chosen = {name: (rule(first)["method"], rule(first)["rate"]) for name, rule in rules.items()}
    assert chosen == {
        "best possible": ("FLOW", 0.01),
        "by drift": ("FLOW", 0.01),
        "blind": ("standard", 0.03),
        "smallest rate": ("FLOW", 0.01),
        "least weight distance": ("standard", 0.01),
        "least drift": ("FLOW", 0.01),
        "linear probe": ("linear probe", 0.0),
    }


def test_what_is_chosen_is_averaged_on_whole_seeds(records):
    def outcomes(rule, runs):
        return [choosing_rules.average(run) for run in on_whole_seeds(rule, runs)]

    rules = choosing_rules.rules("new task")
    assert outcomes(rules["blind"], records) == [54.0, 54.5]
    # A seed whose runs are not all there has nothing to choose from that others have.
    assert outcomes(rules["linear probe"], records[1:]) == [70.0]


def test_the_page_shows_every_part(records):
    text = drift_page.drift_page({"mine": records})
    assert "| kl, new task | 1.00 / nan |" in text
    for probe in drift_page.PROBES:
        assert f"| by drift, {probe} | 77.5 ± 0.0 |" in text
    assert "| blind | 54.2 ± 0.4 |" in text
    alone = text.partition("standard fine-tuning alone:")[2]
    assert "| by drift, inverted | 67.0 ± 0.0 |" in alone  # 84 and 50
    assert "linear probe" not in alone.partition("## What holds")[0]
    assert "| FLOW | +1" in alone.partition("## What holds")[2]
    assert not drift_page.can_tell(records[:1])
    assert drift_page.can_tell(records)


def test_the_picture_marks_the_two_choices(records, monkeypatch):
    from benchmarks.forgetting.pages import drift_picture

    drawings = []
    monkeypatch.setattr(drift_picture, "png", lambda each: drawings.append(each) or png(each))
    drawn = drift_picture.draw_drift(records, "new task", drift_page.OLD)
    assert drawn[:4] == b"\x89PNG"
    left, right = drawings[0].axes
    assert left.get_xlabel() == "what drift says is kept (order only)"
    assert right.get_xlabel() == "accuracy on the old task (%)"
    assert [text.get_text() for text in left.get_legend().get_texts()] == [
        "FLOW (easy samples count more), at several learning rates",
        "plain fine-tuning, at several learning rates",
        "other methods and rates",
        "chosen by drift",
        "chosen by validation alone",
    ]


def test_right_answers_survive_their_text_and_count():
    bits = torch.rand(1001, generator=torch.Generator().manual_seed(0)) > 0.3
    assert torch.equal(unpacked(packed(bits), 1001), bits)
    model = nn.Linear(2, 2)
    data = TensorDataset(torch.randn(700, 2), torch.randint(2, (700,)))
    answers = model(data.tensors[0]).argmax(1)
    assert torch.equal(hits(model, data), answers == data.tensors[1])


def test_statistics_taken_anew_are_those_of_the_samples():
    body = nn.Sequential(nn.BatchNorm1d(3)).eval()
    inputs = 5 + 2 * torch.randn(500, 3)
    retake_statistics(body, TensorDataset(inputs, torch.zeros(500)))
    torch.testing.assert_close(body[0].running_mean, inputs.mean(0), rtol=1e-4, atol=1e-4)
    halves = torch.stack([half.var(0) for half in inputs.split(250)]).mean(0)
    torch.testing.assert_close(body[0].running_var, halves, rtol=1e-4, atol=1e-4)
    assert not body.training


@pytest.mark.parametrize(("draw", "classes"), [(letters, 26), (textures, len(TEXTURES))])
def test_drawn_images_are_the_same_each_time_and_of_every_class(draw, classes):
    images, labels = draw(300)
    assert images.shape == (300, 32, 32, 3)
    assert set(labels) == set(range(classes))
    again, labels_again = draw(300)
    assert np.array_equal(images, again)
    assert np.array_equal(labels, labels_again)


def test_few_samples_are_the_first_ones():
    from benchmarks.forgetting.readouts import of_few

    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
    meter = DriftMeter(model, torch.randn(300, 4))
    with torch.no_grad():
        model[0].weight += 0.1 * torch.randn(8, 4)
    drift = meter(model)
    few = of_few(drift)
    assert few["16"]["kl"] == pytest.approx(drift.per_sample["kl"][:16].mean().item(), abs=1e-4)
    assert set(few) == {"16", "32", "64", "128", "256"}
