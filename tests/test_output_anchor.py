"""The output anchor against autograd on full logits."""

import copy
from functools import partial

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import nn
from torch.distributed.algorithms._checkpoint.checkpoint_wrapper import (
    CheckpointImpl,
    checkpoint_wrapper,
)
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from torch.utils.data import DataLoader

from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.drift import DriftMeter, OutputAnchor, output_penalty
from flowdata.errors import ScoreMismatchError
from flowdata.head import kl
from tests import reference
from tests.models import TinyResNet, images, tiny_llama, token_samples
from tests.test_drift import moved, of_causal

TOKENS = token_samples(6, longest=20)


def expected_penalty(base, tuned, samples, logits_of, strength, pull=0.2):
    values = []
    for sample in samples:
        with torch.no_grad():
            p = logits_of(base, sample).log_softmax(-1)
        q = logits_of(tuned, sample).log_softmax(-1)
        values.append((p.exp() * (p - q)).sum(-1).flatten())
    return reference.bounded_penalty(torch.cat(values), strength, pull).mean().float()


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


@pytest.mark.parametrize("strength", [0.03, 0.3, 10.0, 1000.0])
def test_penalty_and_gradients_are_those_of_full_logits(strength):
    base = tiny_llama()
    tuned = moved(base, 0.05)
    meter = DriftMeter(base, TOKENS, dtype="float32")
    anchor = OutputAnchor(meter, strength=strength, batch_size=6)
    penalty = anchor(tuned.train())
    assert tuned.training
    expected = expected_penalty(base.eval(), tuned.eval(), TOKENS, of_causal, strength)
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
        with torch.no_grad():
            tuned.head.weight.mul_(0.4)
    anchor = OutputAnchor(DriftMeter(base, data), strength=1.0, batch_size=10)
    penalty = anchor(tuned.train())
    assert tuned.block[3].training
    samples = [image for image, _ in data]
    # A new layer of smaller weights is pulled past less hard, by as much as they are smaller.
    sizes = [model.head.weight.square().mean().sqrt() for model in (tuned, base)]
    ratio = (sizes[0] / sizes[1]).clamp(max=1).item()
    expected = expected_penalty(
        base.eval(), held.eval(), samples, lambda m, s: m(s[None]), 1.0, 0.2 * ratio
    )
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
    expected = expected_penalty(base.eval(), tuned, TOKENS, of_causal, 1.0)
    penalty = anchor(tuned)
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(tuned, penalty, expected)


@pytest.mark.parametrize("labels", [False, True])
def test_dropout_in_the_output_layer_is_off_forward_and_backward(labels):
    base, samples, target = tiny_llama(), TOKENS, "lm_head"
    if labels:
        base, target = nn.Sequential(nn.Linear(8, 16), nn.ReLU(), nn.Linear(16, 5)), "2"
        samples = [(torch.randn(8), torch.tensor([1.0, 1, 0, 0, 1])) for _ in range(6)]
    config = LoraConfig(target_modules=[target], lora_dropout=0.5, init_lora_weights=False)
    tuned = get_peft_model(copy.deepcopy(base), config)
    meter = DriftMeter(base, samples, dtype="float32")
    penalties = [OutputAnchor(meter, 1.0, 6)(tuned.train(mode)) for mode in (False, True)]
    assert penalties[0] == penalties[1] > 0
    assert_same_gradients(tuned, *penalties)


class Checkpointed(nn.Module):
    """Runs a block again in the backward pass, in every mode."""

    def __init__(self, block):
        super().__init__()
        self.block = block

    def forward(self, x):
        return checkpoint(self.block, x, use_reentrant=False)


CHECKPOINTS = {
    "a function": Checkpointed,
    "PyTorch's wrapper": checkpoint_wrapper,
    "reentrant": partial(checkpoint_wrapper, checkpoint_impl=CheckpointImpl.REENTRANT),
}


@pytest.mark.parametrize("training", [False, True])
@pytest.mark.parametrize("kind", CHECKPOINTS)
def test_checkpoints_leave_the_gradients_as_they_are(kind, training):
    torch.manual_seed(0)
    block = nn.Sequential(nn.Linear(16, 16), nn.BatchNorm1d(16), nn.ReLU(), nn.Dropout(0.5))
    base = nn.Sequential(nn.Linear(4, 16), block, nn.Linear(16, 3))
    probe = torch.randn(32, 4)
    anchor = OutputAnchor(DriftMeter(base, probe), 1.0, batch_size=32)
    plain = moved(base).train(training)
    tuned = copy.deepcopy(plain)
    tuned[1] = CHECKPOINTS[kind](tuned[1])
    calls = []
    next(tuned[1].children()).register_forward_pre_hook(lambda *_: calls.append(1))
    statistics = [each.clone() for each in tuned.buffers()]
    for model in (plain, tuned):
        anchor._step = 0
        anchor(model).backward()
    for one, other in zip(plain.parameters(), tuned.parameters(), strict=True):
        torch.testing.assert_close(one.grad, other.grad)
    assert all(map(torch.equal, tuned.buffers(), statistics))
    # The loss beside it is checkpointed as ever.
    calls.clear()
    tuned(probe.requires_grad_()).sum().backward()
    assert len(calls) == 2


@pytest.mark.parametrize("lora", [False, True])
def test_samples_without_a_target_cost_nothing(lora):
    base = tiny_llama()
    samples = [{**TOKENS[0], "labels": torch.full_like(TOKENS[0]["input_ids"], -100)}, TOKENS[1]]
    tuned = moved(base)
    if lora:
        tuned = get_peft_model(tuned, LoraConfig(target_modules=["lm_head"], lora_dropout=0.1))
    anchor = OutputAnchor(DriftMeter(base, samples, dtype="float32"), 1.0, batch_size=1)
    penalties = dict(zip(anchor._order(0).tolist(), (anchor(tuned), anchor(tuned)), strict=True))
    assert penalties[0] == 0 < penalties[1]
    penalties[0].backward()
    assert not any(p.grad is not None and p.grad.any() for p in tuned.parameters())


def test_every_sample_comes_once_before_any_comes_twice():
    meter = DriftMeter(TinyResNet(), images(10))
    anchor = OutputAnchor(meter, strength=1.0, batch_size=4)
    places = []
    for step in range(5):
        anchor._step = step
        places += anchor._places()
    assert sorted(places[:10]) == sorted(places[10:]) == list(range(10))
    assert places[:10] != places[10:]


def test_a_probe_smaller_than_a_batch_is_held_whole_in_every_step():
    anchor = OutputAnchor(DriftMeter(TinyResNet(), images(9)), strength=1.0, batch_size=16)
    for step in range(4):
        anchor._step = step
        assert sorted(anchor._places()) == list(range(9))


def test_what_can_not_be_an_anchor_is_refused():
    meter = DriftMeter(TinyResNet(), images(4))
    with pytest.raises(ValueError, match="strength must be finite and >= 0, got nan"):
        OutputAnchor(meter, float("nan"))
    with pytest.raises(ValueError, match="batch_size"):
        OutputAnchor(meter, 0.1, batch_size=0)
    with pytest.raises(TypeError, match="meter must be a DriftMeter, got TinyResNet"):
        OutputAnchor(TinyResNet(), 0.1)


# What the penalty is


@pytest.mark.parametrize("strength", [1e-300, 0.01, 1, 10, 1e3, 1e300])
@pytest.mark.parametrize("distance", [0.0, 1e-6, 0.1, 30.0, 1e4])
def test_no_target_pulls_harder_than_a_fifth_of_a_wrong_label(strength, distance):
    torch.manual_seed(0)
    reference_logits = 3 * torch.randn(4, 7)
    logits = reference_logits + distance * torch.randn(4, 7)
    logits.requires_grad_(True)
    penalty = output_penalty(logits, reference_logits, strength)
    penalty.backward()
    assert penalty.isfinite()
    pulls = 4 * logits.grad.norm(dim=1)  # the penalty is a mean over four targets
    assert (pulls <= 0.2 + 1e-5).all()
    if distance == 30 and strength >= 1:
        assert (pulls > 0.01).all()  # it does not let go


def test_a_small_drift_costs_strength_times_kl():
    logits = torch.tensor([[0.0, 1.0, 2.0]])
    moved_logits = logits + torch.tensor([[0.0, 0.05, 0.0]])
    p, q = logits.log_softmax(1), moved_logits.log_softmax(1)
    divergence = (p.exp() * (p - q)).sum().item()
    penalty = output_penalty(moved_logits, logits, strength=0.1).item()
    assert penalty == pytest.approx(0.1 * divergence, rel=1e-3)
    assert output_penalty(moved_logits, logits, strength=0) == 0
    assert output_penalty(moved_logits[:0], logits[:0], strength=0.1) == 0
    rows, head = torch.ones(0, 4), nn.Linear(4, 3).requires_grad_(False)
    assert output_penalty(rows, rows, strength=0.1, head=head) == 0


def test_a_penalty_is_float64_where_outputs_are_and_no_head_is_given():
    for dtype in (torch.float64, torch.float32, torch.bfloat16):
        rows, head = torch.ones(2, 4, dtype=dtype), nn.Linear(4, 3, dtype=dtype)
        exact = torch.float64 if dtype == torch.float64 else torch.float32
        assert output_penalty(rows, rows, strength=0.1).dtype == exact
        penalty = output_penalty(rows, rows, strength=0.1, head=head.requires_grad_(False))
        assert penalty.dtype == torch.float32


def test_the_frozen_model_itself_costs_nothing():
    base = TinyResNet()
    for strength in (0.1, 1000):
        anchor = OutputAnchor(DriftMeter(base, images(10)), strength, batch_size=10)
        assert anchor(base) < 1e-6 * strength
    model = tiny_llama()
    anchor = OutputAnchor(DriftMeter(model, TOKENS), strength=1000, batch_size=6)
    assert anchor(model) < 1e-3  # the rounding of bfloat16, where that is fast


def test_a_meter_made_in_inference_mode_holds_as_another_does():
    base, data = TinyResNet(), images(6)
    tuned = moved(base)
    with torch.inference_mode():
        meter = DriftMeter(base, data)
    penalty = OutputAnchor(meter, 1.0, batch_size=6)(tuned)
    penalty.backward()
    assert penalty == OutputAnchor(DriftMeter(base, data), 1.0, batch_size=6)(tuned)
    assert any(p.grad is not None and p.grad.any() for p in tuned.parameters())


@pytest.mark.parametrize("classes", [5, 3])
def test_a_head_that_starts_at_zero_is_measured_once_it_is_trained(classes):
    base, data = TinyResNet(), images(6)
    with torch.no_grad():
        base.head.weight.zero_()
        base.head.bias.zero_()
    meter = DriftMeter(base, data)
    anchor = OutputAnchor(meter, 1e-3, batch_size=6)
    assert anchor(base) == 0
    tuned = copy.deepcopy(base)
    tuned.head = nn.Linear(16, classes)
    drift = meter(tuned)
    assert (drift.kl > 1e-3) == (classes == 5)  # another task's head says nothing of the old one
    assert 1e3 * anchor(tuned).item() == pytest.approx(drift.kl, rel=1e-2)
    nn.init.zeros_(tuned.head.weight)
    assert anchor(tuned).isfinite()


# Training


def fine_tuned(optimizer, anchor_of, model, batches):
    """A model after some steps on new labels, from where it stands."""
    model = copy.deepcopy(model)
    anchor, steps = anchor_of(model), optimizer(model.parameters())
    for inputs, targets in batches:
        steps.zero_grad()
        loss = nn.functional.cross_entropy(model(inputs), targets) + anchor(model)
        loss.backward()
        steps.step()
    return model


OPTIMIZERS = {
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.1, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=3e-3),
}


@pytest.fixture(scope="module")
def old_task():
    """A network that has learned a task, its probe, and batches of another task."""
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 32), nn.ReLU(), nn.Linear(32, 32), nn.ReLU())
    model.append(nn.Linear(32, 4))
    inputs, rule = torch.randn(512, 8), torch.randn(8, 4)
    targets = (inputs @ rule).argmax(1)
    steps = torch.optim.AdamW(model.parameters(), lr=1e-2)
    for _ in range(200):
        steps.zero_grad()
        nn.functional.cross_entropy(model(inputs), targets).backward()
        steps.step()
    other = (inputs @ torch.randn(8, 4)).argmax(1)
    places = torch.randint(512, (60, 32))
    return model, inputs[:128], [(inputs[p] + 0.5, other[p]) for p in places]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strength", [0.1, 10, 1000])
def test_no_strength_diverges_what_trains_without_it(optimizer, strength, old_task):
    model, probe, batches = old_task
    meter = DriftMeter(model, probe)
    untouched = fine_tuned(OPTIMIZERS[optimizer], lambda _: lambda _: 0.0, model, batches)
    held = fine_tuned(
        OPTIMIZERS[optimizer], lambda _: OutputAnchor(meter, strength, 32), model, batches
    )
    assert all(p.isfinite().all() for p in held.parameters())
    assert meter(held).kl < meter(untouched).kl


LARGE = {  # the largest rates at which this network still learns by itself
    "SGD": lambda parameters: torch.optim.SGD(parameters, lr=0.3, momentum=0.9),
    "AdamW": lambda parameters: torch.optim.AdamW(parameters, lr=0.1),
}


@pytest.mark.parametrize("optimizer", LARGE)
@pytest.mark.parametrize("strength", [1, 10, 100])
def test_at_the_largest_rates_what_is_held_learns_nearly_as_much(optimizer, strength, old_task):
    model, probe, batches = old_task
    meter = DriftMeter(model, probe)
    untouched = fine_tuned(LARGE[optimizer], lambda _: lambda _: 0.0, model, batches)
    held = fine_tuned(LARGE[optimizer], lambda _: OutputAnchor(meter, strength, 32), model, batches)

    def accuracy(model):
        with torch.no_grad():
            return torch.cat([model(x).argmax(1) == y for x, y in batches]).float().mean()

    assert all(p.isfinite().all() for p in held.parameters())
    assert accuracy(untouched) > 0.55
    assert accuracy(held) > accuracy(untouched) - 0.2
    assert meter(held).kl < meter(untouched).kl


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("strength", [0.1, 1000])
def test_a_new_head_of_small_weights_is_trained_past_a_large_old_one(optimizer, strength, old_task):
    model, probe, batches = old_task
    with torch.no_grad():
        model = copy.deepcopy(model)
        model[4].weight.mul_(4)
    meter = DriftMeter(model, probe)
    begun = copy.deepcopy(model)
    begun[4] = nn.Linear(32, 4)
    untouched = fine_tuned(OPTIMIZERS[optimizer], lambda _: lambda _: 0.0, begun, batches)
    held = fine_tuned(
        OPTIMIZERS[optimizer], lambda _: OutputAnchor(meter, strength, 32), begun, batches
    )
    assert all(p.isfinite().all() for p in held.parameters())
    assert meter(held).kl <= meter(untouched).kl


@pytest.mark.parametrize("optimizer", ["SGD", "AdamW"])
@pytest.mark.parametrize("strength", [0.1, 1000])
def test_a_language_model_is_held_at_any_strength(optimizer, strength):
    base = tiny_llama()
    meter, batch = DriftMeter(base, TOKENS, dtype="float32"), {"input_ids": torch.arange(40)[None]}
    drifts = []
    for anchor in (None, OutputAnchor(meter, strength, batch_size=3)):
        model = copy.deepcopy(base)
        steps = OPTIMIZERS[optimizer](model.parameters())
        for _ in range(25):
            steps.zero_grad()
            loss = model(**batch, labels=batch["input_ids"]).loss
            (loss if anchor is None else loss + anchor(model)).backward()
            steps.step()
        drifts.append(meter(model).kl)
    assert drifts[1] < drifts[0]


# On the training batch itself


def test_reference_outputs_come_with_the_samples_and_hold_the_old_head():
    base, data = TinyResNet(), images(10)
    outputs = DriftMeter(base, data).outputs()
    with torch.no_grad():
        expected = base.eval()(torch.stack([image for image, _ in data]))
    torch.testing.assert_close(outputs, expected)
    for layout in ("pair", "triple"):
        dataset = FlowWeightedDataset(data, torch.rand(10), layout=layout, reference=outputs)
        assert torch.equal(dataset[-1][-1], outputs[-1])
        for collate in (None, WeightedCollator(torch.utils.data.default_collate)):
            *_, weights, references = next(iter(DataLoader(dataset, 4, collate_fn=collate)))
            assert torch.equal(references, outputs[:4])
            assert weights.shape == (4,)
    rows = [{"x": torch.ones(2)} for _ in range(10)]
    dataset = FlowWeightedDataset(rows, torch.rand(10), layout="dict", reference=outputs)
    assert torch.equal(next(iter(DataLoader(dataset, 4)))["reference"], outputs[:4])


def test_a_batch_is_held_as_a_probe_of_its_samples_is():
    base, data = TinyResNet(), images(10)
    tuned = moved(base, 0.05).eval()
    meter = DriftMeter(base, data, batch_norm="own")
    penalty = output_penalty(tuned(torch.stack([i for i, _ in data])), meter.outputs(), 0.3)
    on_probe = OutputAnchor(meter, 0.3, batch_size=10)(tuned)
    torch.testing.assert_close(penalty, on_probe, rtol=1e-4, atol=1e-6)
    assert_same_gradients(tuned, penalty, on_probe)


def test_adapters_are_held_to_their_base_without_logits():
    base = tiny_llama()
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False)
    model = get_peft_model(copy.deepcopy(base), config).eval()
    body, head = model.base_model.model.model, model.get_output_embeddings()
    ids = torch.arange(30)[None]
    with torch.no_grad(), model.disable_adapter():
        rows = body(ids).last_hidden_state[0]
    penalty = output_penalty(body(ids).last_hidden_state[0], rows, 0.3, head=head)
    expected = expected_penalty(
        base.eval(), model, [ids], lambda m, ids: m(input_ids=ids).logits[0], 0.3
    )
    torch.testing.assert_close(penalty, expected, rtol=1e-4, atol=1e-6)
    assert_same_gradients(model, penalty, expected)


class LargestTensor(TorchDispatchMode):
    """The number of values in the largest floating tensor that is made, forward or backward."""

    size = 0

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        result = function(*args, **(kwargs or {}))
        for each in result if isinstance(result, tuple | list) else [result]:
            if isinstance(each, torch.Tensor) and each.is_floating_point():
                self.size = max(self.size, each.numel())
        return result


@pytest.mark.parametrize("lora", [False, True])
def test_no_logits_are_held_forward_or_backward(lora, monkeypatch):
    monkeypatch.setitem(kl._TILE, "cpu", (16, 32))
    model = tiny_llama(vocab_size=4096, hidden_size=16, num_attention_heads=2)
    samples = [{"input_ids": torch.randint(4096, (101,))} for _ in range(4)]
    meter = DriftMeter(model, samples, dtype="float32")
    if lora:
        model = get_peft_model(model, LoraConfig(target_modules=["q_proj"]))
    anchor = OutputAnchor(meter, 1.0, batch_size=4)
    with LargestTensor() as largest:
        anchor(model).backward()
    assert largest.size < 400 * 4096 / 4


def test_what_can_not_be_a_reference_is_refused():
    logits, data = torch.zeros(3, 5), images(4)
    with pytest.raises(ValueError, match=r"got \(3, 5\) and \(3, 4\)"):
        output_penalty(logits, torch.zeros(3, 4), 0.1)
    with pytest.raises(ValueError, match=r"head must be a plain nn\.Linear that is not trained"):
        output_penalty(logits, logits, 0.1, head=nn.Linear(5, 9))
    with pytest.raises(ValueError, match="strength"):
        output_penalty(logits, logits, -1)
    with pytest.raises(ScoreMismatchError, match="one row for each of the 4 samples"):
        FlowWeightedDataset(data, torch.ones(4), reference=torch.zeros(3, 5))
    with pytest.raises(TypeError, match="reference must be a floating tensor"):
        FlowWeightedDataset(data, torch.ones(4), reference=[1.0])
    with pytest.raises(ValueError, match="OutputAnchor"):
        DriftMeter(tiny_llama(), TOKENS).outputs()
