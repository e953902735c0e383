"""Drift of models with several labels, and of outputs that are no logits."""

import copy

import pytest
import torch
from torch import nn

from flowdata._common import notices
from flowdata.drift import DriftMeter, OutputAnchor
from tests import reference
from tests.test_drift import classified, encoder, truth
from tests.test_drift_kinds import MANY, Body, answers, check

LABELS = torch.rand(64, 3, generator=torch.Generator().manual_seed(2)) > 0.5


def shifted(model, by):
    """A model whose answers all become likelier, which a softmax would not see."""
    tuned = copy.deepcopy(model)
    with torch.no_grad():
        tuned.head.bias.add_(by)
    return tuned


@pytest.mark.parametrize("kind", [torch.bool, torch.float32])
def test_labels_of_each_class_make_a_drift_of_answers(kind):
    base, samples = Body(), list(zip(MANY, LABELS.to(kind), strict=True))
    tuned, meter = shifted(base, 3.0), DriftMeter(base, samples)
    drift = meter(tuned)
    expected = truth(base, tuned, MANY, lambda model, image: answers(model(image[None])))
    for name, value in expected.items():
        assert getattr(drift, name) == pytest.approx(float(value), rel=1e-3)
    assert drift.kl > 0.1
    assert drift.agreement < 0.9
    assert (meter(base).kl, meter(base).agreement) == (0, 1)
    assert DriftMeter(base, MANY)(shifted(base, 3.0)).kl < 1e-9  # nothing tells of answers


def orders():
    """Places of labels such that samples with one label, with several and with none come first."""
    counts = LABELS.sum(1)
    return [sorted(range(64), key=lambda place: int(counts[place] != count)) for count in range(4)]


@pytest.mark.parametrize("kind", [torch.bool, torch.float32, torch.int64, torch.uint8])
def test_whichever_sample_comes_first_the_answers_are_answers(kind):
    base = Body()
    tuned, values = shifted(base, 3.0), []
    for order in orders():
        meter = DriftMeter(base, list(zip(MANY[order], LABELS[order].to(kind), strict=True)))
        assert meter.has_several_labels
        values.append(meter(tuned).kl)
    assert values == pytest.approx([values[0]] * 4, rel=1e-5)
    assert values[0] > 0.1


class Counted(torch.utils.data.Dataset):
    """Samples that count how often they are read."""

    def __init__(self, labels):
        self.samples, self.reads = list(zip(MANY, labels, strict=True)), 0

    def __len__(self):
        return len(self.samples)

    def __getitem__(self, index):
        self.reads += 1
        return self.samples[index]


def test_labels_are_those_that_are_read_with_the_samples(tmp_path):
    base, reads = Body(), []
    classes, answered = torch.arange(64) % 3, LABELS[orders()[1]].long()
    for name in ("made", "kept"):
        for number, labels in enumerate((classes, answered)):
            data = Counted(labels)
            options = {"store": tmp_path / f"{number}.safetensors", "dataset_id": "mine"}
            meter = DriftMeter(base, data, **options)
            assert meter.has_several_labels == bool(number)
            reads.append((name, data.reads))
    (_, plain), (_, several), (_, kept_plain), (_, kept_several) = reads
    assert several == plain
    assert kept_several == kept_plain + 63  # of classes the first sample tells all


def test_integers_of_places_are_classes_of_them():
    class Framewise(nn.Module):
        def __init__(self):
            super().__init__()
            self.head = nn.Conv1d(5, 3, 1)

        def forward(self, x):
            return self.head(x)

    base, samples = Framewise(), list(zip(torch.randn(8, 5, 3), LABELS[:8].long(), strict=True))
    meter = DriftMeter(base, samples)
    assert not meter.has_several_labels
    assert meter(shifted(base, 3.0)).kl < 1e-9


@pytest.mark.parametrize("kind", [torch.float32, torch.int64])
def test_a_single_1_in_each_row_is_taken_for_one_class_and_said(kind, caplog, monkeypatch):
    monkeypatch.setattr(notices, "_said", set())  # by other tests
    caplog.set_level("INFO", logger="flowdata")
    one_hot = torch.eye(3)[torch.arange(64) % 3]
    for labels in (one_hot * 0.9 + 0.1 / 3, one_hot.bool(), torch.arange(64) % 3):
        DriftMeter(Body(), list(zip(MANY, labels, strict=True)))
    assert "single 1" not in caplog.text
    meter = DriftMeter(Body(), list(zip(MANY, one_hot.to(kind), strict=True)))
    assert not meter.has_several_labels
    assert "a single 1 in each row: they can be one class for each sample or a yes" in caplog.text
    assert "measured as of one class; bools are taken for a yes or no" in caplog.text


def test_one_class_among_several_is_what_other_labels_say():
    base = Body()
    one_hot = torch.eye(3)[torch.arange(64) % 3]
    for labels in (one_hot, torch.arange(64) % 3, one_hot * 0.9 + 0.1 / 3, torch.rand(64, 7)):
        drift = DriftMeter(base, list(zip(MANY, labels, strict=True)))(shifted(base, 3.0))
        assert drift.kl < 1e-9


def test_answers_are_held_and_not_handed_out():
    base, samples = Body(), list(zip(MANY, LABELS.float(), strict=True))
    tuned = shifted(base, 0.05)
    meter = DriftMeter(base, samples)
    anchor = OutputAnchor(meter, 1e-2, batch_size=64)
    penalty = anchor(tuned)
    assert 1e2 * penalty.item() == pytest.approx(meter(tuned).kl, rel=1e-2)
    penalty.backward()
    ours = tuned.head.bias.grad.clone()
    tuned.zero_grad()
    with torch.no_grad():
        before = answers(base(MANY)).log_softmax(1)
    after = answers(tuned(MANY)).log_softmax(1)
    values = (before.exp() * (before - after)).sum(1).view(64, 3).mean(1)
    reference.bounded_penalty(values, 1e-2, 0.2).mean().backward()
    torch.testing.assert_close(ours, tuned.head.bias.grad, rtol=1e-3, atol=1e-8)
    assert anchor(base).item() == 0
    with pytest.raises(ValueError, match=r"yes or no to each: hold it with OutputAnchor"):
        meter.outputs()


def test_real_numbers_are_no_classes():
    with pytest.raises(ValueError, match="predicts real numbers"):
        DriftMeter(Body(), list(zip(MANY, torch.randn(64, 3), strict=True)))
    for labels in (torch.rand(64, 3), torch.randint(0, 2, (64, 3)) * 0.9 + 0.05):
        with pytest.raises(ValueError, match=r"can be answers, .* give answers as 0 and 1"):
            DriftMeter(Body(), list(zip(MANY, labels, strict=True)))
    looks_so = torch.randint(0, 6, (64, 3))
    for first in ([0, 1, 1], [0, 1, 0]):
        looks_so[0] = torch.tensor(first)
        for labels in (looks_so, looks_so.float()):
            with pytest.raises(ValueError, match=r"as the probe's labels say, .* without them$"):
                DriftMeter(Body(), list(zip(MANY, labels, strict=True)))
    options = {"num_labels": 4, "problem_type": "regression"}
    model = encoder("BertForSequenceClassification", **options)
    with pytest.raises(ValueError, match=r"predicts real numbers .* as its configuration says"):
        DriftMeter(model, classified(5))


@pytest.mark.parametrize("last", [nn.Softmax(1), nn.Sigmoid()], ids=["softmax", "sigmoid"])
def test_probabilities_are_refused(last):
    with pytest.raises(ValueError, match=r"returns probabilities.*before its softmax or sigmoid"):
        DriftMeter(nn.Sequential(Body(), last), MANY)


def test_one_logit_is_refused_with_what_to_do():
    base = Body(nn.Linear(8, 1))
    with pytest.raises(ValueError, match=r"one output.*torch\.cat\(\[torch\.zeros_like\(z\), z\]"):
        DriftMeter(base, MANY)

    class Both(nn.Module):
        def __init__(self, inner):
            super().__init__()
            self.inner = inner

        @property
        def head(self):
            return self.inner.head

        def forward(self, x):
            z = self.inner(x)
            return torch.cat([torch.zeros_like(z), z], 1)

    both = Both(base)
    check(both, shifted(both, 1.0), MANY, lambda m, s: m(s[None]))
