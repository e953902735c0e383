"""The output anchor against autograd on full logits."""

import copy

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn

from flowdata.drift import DriftMeter, OutputAnchor
from tests.models import TinyResNet, images, tiny_llama, token_samples
from tests.test_drift import moved, of_causal

TOKENS = token_samples(6, longest=20)


def expected_penalty(base, tuned, samples, logits_of):
    values = []
    for sample in samples:
        with torch.no_grad():
            p = logits_of(base, sample).log_softmax(-1)
        q = logits_of(tuned, sample).log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1).flatten())
    return torch.log1p(torch.cat(values)).mean()


def gradients(model):
    return [None if p.grad is None else p.grad.clone() for p in model.parameters()]


def assert_same_gradients(model, penalty, other_penalty):
    model.zero_grad()
    penalty.backward()
    ours = gradients(model)
    model.zero_grad()
    other_penalty.backward()
    for one, other in zip(ours, gradients(model), strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            torch.testing.assert_close(one, other, rtol=1e-3, atol=1e-6)


def test_penalty_and_gradients_are_those_of_full_logits():
    base = tiny_llama()
    tuned = moved(base, 0.05)
    anchor = OutputAnchor(DriftMeter(base, TOKENS, dtype="float32"), strength=0.3, batch_size=6)
    penalty = anchor(tuned.train())
    assert tuned.training
    expected = 0.3 * expected_penalty(base.eval(), tuned.eval(), TOKENS, of_causal)
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(tuned, penalty, expected)


@pytest.mark.parametrize("new_head", [False, True])
def test_classifiers_are_held_through_their_own_head_or_the_frozen_one(new_head):
    base, data = TinyResNet(), images(10)
    tuned = copy.deepcopy(base)
    with torch.no_grad():
        tuned.block[0].weight.add_(0.1 * torch.randn_like(tuned.block[0].weight))
    held = copy.deepcopy(tuned)
    if new_head:
        tuned.head = nn.Linear(16, 3)
    anchor = OutputAnchor(DriftMeter(base, data), strength=1.0, batch_size=10)
    penalty = anchor(tuned.train())
    assert tuned.block[3].training
    samples = [image for image, _ in data]
    expected = expected_penalty(base.eval(), held.eval(), samples, lambda m, s: m(s[None]))
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    penalty.backward()
    expected.backward()
    torch.testing.assert_close(
        tuned.block[0].weight.grad, held.block[0].weight.grad, rtol=1e-3, atol=1e-6
    )
    assert tuned.stem[1].weight.grad is None  # BatchNorm is the frozen model's


def test_adapters_of_the_output_layer_are_held_too():
    base = tiny_llama()
    config = LoraConfig(target_modules=["q_proj", "lm_head"], init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(base), config).eval()
    anchor = OutputAnchor(DriftMeter(base, TOKENS, dtype="float32"), strength=1.0, batch_size=6)
    expected = expected_penalty(base.eval(), tuned, TOKENS, of_causal)
    penalty = anchor(tuned)
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(tuned, penalty, expected)


def test_every_sample_comes_once_before_any_comes_twice():
    meter = DriftMeter(TinyResNet(), images(10))
    anchor = OutputAnchor(meter, strength=1.0, batch_size=4)
    places = []
    for step in range(5):
        anchor._step = step
        places += anchor._places()
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10] != places[10:]


def test_what_can_not_be_an_anchor_is_refused():
    meter = DriftMeter(TinyResNet(), images(4))
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got nan"):
        OutputAnchor(meter, float("nan"))
    with pytest.raises(ValueError, match="batch_size"):
        OutputAnchor(meter, 0.1, batch_size=0)
    with pytest.raises(TypeError, match="meter must be a DriftMeter, got TinyResNet"):
        OutputAnchor(TinyResNet(), 0.1)
