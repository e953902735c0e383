"""Drift of models with several labels, and of outputs that are no logits."""

import copy

import pytest
import torch
from torch import nn

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
    options = {"num_labels": 4, "problem_type": "regression"}
    model = encoder("BertForSequenceClassification", **options)
    with pytest.raises(ValueError, match="predicts real numbers"):
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
