"""What the study of language measures beside losses."""

import doctest

import pytest
import torch

from benchmarks.forgetting import batches, language
from benchmarks.forgetting import language_readouts as readouts
from benchmarks.forgetting.methods import AVERAGES
from flowdata.drift import DriftMeter
from tests.test_forgetting_language import assets, model, task  # noqa: F401


def test_the_examples_hold():
    assert doctest.testmod(readouts).failed == 0


def test_own_texts_are_kept_in_files_and_serve_again(task):  # noqa: F811
    folder = task.scores
    files = [folder / "own_text.safetensors", folder / "own_text_after_BOS.safetensors"]
    before = [file.read_bytes() for file in files]
    again = readouts.DriftReadout(task.model, task.tokenizer, 5, folder)
    assert [file.read_bytes() for file in files] == before
    tuned = task.model_of("standard", 3e-3, 0)
    meter = task.start(0).meter
    assert again(tuned, meter) == task.drift(tuned, meter)


def test_texts_with_and_without_a_chat_begin_apart(task):  # noqa: F811
    chat, plain = (task.drift.meters[name] for name in (readouts.OWN_TEXT, readouts.AFTER_BOS))
    assert (len(chat), len(plain)) == (5, 3)
    tuned = task.model_of("standard", 3e-3, 0)
    assert chat(tuned).kl > 0
    assert plain(tuned).kl != chat(tuned).kl


def test_the_drift_on_few_texts_is_that_of_a_meter_on_these_alone(task):  # noqa: F811
    _, _, validation, meter = task.start(0)
    tuned = task.model_of("FLOW", 3e-3, 0)
    counts = torch.tensor(
        [int((validation[place]["labels"] != -100).sum()) for place in range(len(validation))]
    )
    few = readouts.of_few(meter(tuned), counts)
    alone = DriftMeter(task.model, [validation[place] for place in range(4)])(tuned)
    assert list(few) == ["4"]
    # In bfloat16 a text's rounding depends on those that it is packed with.
    assert few["4"]["kl"] == pytest.approx(alone.kl, rel=5e-3)
    assert few["4"]["cosine"] == pytest.approx(alone.cosine, rel=5e-3)


def test_an_average_is_that_of_the_method_itself(task):  # noqa: F811
    for name, (other, alpha) in AVERAGES.items():
        method = language.ALL[name]
        assert method.weights is language.ALL[other].weights
        averaged, itself = task.model_of(name, 3e-3, 0), task.tuned(name, 3e-3, 0)
        assert alpha in (0.25, 0.5, 0.75)
        for one, two in zip(averaged.parameters(), itself.parameters(), strict=True):
            torch.testing.assert_close(one, two, rtol=0, atol=1e-7)


def test_rivals_are_distance_loss_and_gradient(task):  # noqa: F811
    tuned = task.model_of("standard", 3e-3, 0)
    validation = task.start(0).validation
    found = readouts.rivals(tuned, task.model, validation, 1.5)
    ends = [torch.cat([p.flatten() for p in m.parameters()]) for m in (tuned, task.model)]
    assert found["weight distance"] == pytest.approx((ends[0] - ends[1]).norm().item(), rel=1e-5)
    assert found["validation loss"] == 1.5
    samples = [validation[place] for place in range(len(validation))]
    rows = [each | {"weight": torch.ones(len(each["labels"]))} for each in samples]
    batches.batch_loss(tuned, batches.collate(rows)).backward()
    gradient = torch.cat([p.grad.flatten() for p in tuned.parameters() if p.grad is not None])
    assert found["gradient norm"] == pytest.approx(gradient.norm().item(), rel=0.02)
    tuned.zero_grad()
    readouts.rivals(tuned, task.model, validation, 1.5)
    assert all(p.grad is None for p in tuned.parameters())
    same = readouts.rivals(task.model, task.model, validation, 1.5)
    assert same["weight distance"] == 0
    assert same["gradient norm"] > 0
