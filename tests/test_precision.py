import threading
from types import SimpleNamespace

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset
from transformers.modeling_outputs import CausalLMOutput

from flowdata import DriftMeter, LossScorer
from flowdata.models.copies import frozen_model
from flowdata.models.precision import resolve_dtype
from flowdata.probe.features import compute_features
from tests import reference
from tests.models import TinyResNet, images, tiny_llama, token_samples
from tests.test_drift import moved

CPU = torch.device("cpu")


def test_the_callers_own_model_is_lent_when_nothing_needs_converting():
    model = nn.Sequential(nn.Linear(4, 4), nn.Sequential(nn.Dropout())).train()
    model[1].eval()
    before = [module.training for module in model.modules()]
    with frozen_model(model, torch.float32, CPU) as lent:
        assert lent is model
        assert not any(module.training for module in lent.modules())
        assert not torch.is_grad_enabled()
    assert [module.training for module in model.modules()] == before


def test_training_flags_come_back_after_an_error():
    model = TinyResNet().train()
    with pytest.raises(KeyError), frozen_model(model, torch.float32, CPU):
        raise KeyError
    assert model.training


def test_a_model_that_can_not_be_copied_is_lent_where_nothing_needs_converting():
    model = TinyResNet()
    model.guard = threading.Lock()
    with frozen_model(model, torch.float32, CPU) as lent:
        assert lent is model
    with (
        pytest.raises(ValueError, match=r"can't be copied.*pickle '_thread.lock' object"),
        frozen_model(model, torch.bfloat16, CPU),
    ):
        pass


def test_a_copy_takes_the_dtype_and_shares_nothing():
    model = tiny_llama(tie_word_embeddings=True)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with frozen_model(model, torch.bfloat16, CPU) as lent:
        assert all(p.dtype == torch.bfloat16 for p in lent.parameters())
        assert lent.lm_head.weight is lent.model.embed_tokens.weight
        assert lent.model.rotary_emb.inv_freq.dtype == torch.float32
        for parameter in lent.parameters():
            parameter.zero_()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


def test_batch_norm_stays_in_float32_and_the_copy_looks_like_the_original():
    model = TinyResNet()
    with frozen_model(model, torch.bfloat16, CPU) as lent:
        assert lent.stem[0].weight.dtype == torch.bfloat16
        assert lent.stem[1].weight.dtype == torch.float32
        images = torch.randn(4, 3, 8, 8)
        found = lent(images)
    assert found.dtype == torch.float32
    torch.testing.assert_close(found, model.eval()(images), atol=2e-2, rtol=2e-2)


def test_a_convolutional_network_runs_with_channels_last_and_shares_the_rest():
    model = TinyResNet().train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    images = torch.randn(4, 3, 8, 8)
    with frozen_model(model, torch.float32, CPU) as lent:
        layouts = []
        lent.block[0].register_forward_hook(
            lambda layer, args, maps: layouts.append(
                maps.is_contiguous(memory_format=torch.channels_last)
            )
        )
        lent(images)
        assert layouts == [False, True]  # compared once
        assert lent.block[0].weight.is_contiguous()  # for a function that calls the block
        assert lent.head.weight.data_ptr() == model.head.weight.data_ptr()
        assert lent.stem[1].running_mean.data_ptr() != model.stem[1].running_mean.data_ptr()
        found = lent(images)
        assert layouts == [False, True, True]
    assert model.training
    assert model.block[0].weight.is_contiguous()
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    torch.testing.assert_close(found, model.eval()(images), rtol=1e-4, atol=1e-5)


def test_dtypes_have_names():
    model = nn.Linear(2, 2)
    assert resolve_dtype("bfloat16", model, CPU) == torch.bfloat16
    assert resolve_dtype(torch.float16, model, CPU) == torch.float16
    assert resolve_dtype("auto", nn.Linear(2, 2).half(), CPU) == torch.float16
    for wrong in ("int8", "bf16", torch.int8):
        with pytest.raises(ValueError, match="dtype must be 'auto' or one of float32"):
            resolve_dtype(wrong, model, CPU)


@pytest.mark.parametrize("fast", [False, True])
def test_auto_is_bfloat16_where_it_is_fast_and_costs_nothing(monkeypatch, fast):
    monkeypatch.setattr("flowdata.models.precision.is_fast_at_bfloat16", lambda device: fast)
    fastest = torch.bfloat16 if fast else torch.float32
    model = nn.Linear(2, 2)
    assert resolve_dtype("auto", model, CPU) == fastest
    assert resolve_dtype("auto", nn.Identity(), CPU) == fastest
    assert resolve_dtype("auto", model, CPU, one_target=True) == torch.float32
    for own in (torch.float16, torch.bfloat16, torch.float64):
        for one_target in (False, True):
            model = nn.Linear(2, 2).to(own)
            assert resolve_dtype("auto", model, CPU, one_target=one_target) == own
    assert resolve_dtype("bfloat16", model, CPU, one_target=True) == torch.bfloat16
    model = nn.Linear(2, 2)
    model._hf_hook = SimpleNamespace(execution_device=0)  # as accelerate places a model
    assert resolve_dtype("auto", model, CPU) == torch.float32


class Clock(nn.Module):
    """Takes seconds since 1970 in float64, which float32 knows to two minutes."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(2, 3)

    def forward(self, seconds):
        minutes = (seconds - 1.7e9) / 60
        circle = torch.stack([minutes.sin(), minutes.cos()], -1)
        return self.head(circle.to(self.head.weight.dtype)) * 3


@pytest.mark.parametrize("dtype", ["auto", "bfloat16"])
def test_inputs_that_a_model_takes_as_they_are_keep_their_digits(dtype):
    torch.manual_seed(0)
    model = Clock()
    seconds, labels = 1.7e9 + torch.rand(200, dtype=torch.float64) * 1e5, torch.arange(200) % 3
    data, before = TensorDataset(seconds, labels), seconds.clone()
    scores = LossScorer(model, dtype=dtype, progress=False).score(data)
    expected = F.cross_entropy(model(seconds), labels, reduction="none")
    off = 0 if dtype == "auto" else 5e-2
    torch.testing.assert_close(scores.losses, expected.detach(), rtol=1e-5, atol=1e-5 + off)
    assert torch.equal(seconds, before)


class Since(nn.Module):
    """Takes differences from a buffer that is exacter than its parameters."""

    def __init__(self, start, dtype):
        super().__init__()
        torch.manual_seed(0)
        self.head = nn.Linear(2, 3)
        self.register_buffer("start", start)
        self.head.to(dtype)

    def forward(self, times):
        since = times - self.start
        circle = torch.stack([since.sin(), since.cos()], -1)
        return self.head(circle.to(self.head.weight.dtype)).float() * 3


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16])
def test_buffers_that_are_exacter_than_parameters_stay_so(own):
    exacter = torch.float64 if own == torch.float32 else torch.float32
    start = torch.tensor(1.7e9 + 0.7 if own == torch.float32 else 1000.7, dtype=exacter)
    times = start + torch.linspace(0, 6, 60, dtype=exacter)
    labels = torch.arange(60) % 3
    model = Since(start, own)
    expected = F.cross_entropy(model(times), labels, reduction="none").detach()
    losses = LossScorer(model, progress=False).score(TensorDataset(times, labels)).losses
    torch.testing.assert_close(losses, expected)
    features, _ = compute_features(model, TensorDataset(times, labels), progress=False)
    torch.testing.assert_close(features, model(times).detach())


@pytest.mark.parametrize("own", [torch.float32, torch.float64])
@pytest.mark.parametrize("targets", [torch.float64, torch.int64])
def test_squared_errors_of_large_numbers_keep_their_digits(own, targets):
    inputs = torch.arange(1.7e9, 1.7e9 + 6400, 64, dtype=torch.float64)[:, None]
    labels = (inputs[:, 0] + torch.arange(100) % 7).to(targets)
    model = nn.Linear(1, 1).to(own)
    with torch.no_grad():
        model.weight.fill_(1.0)
        model.bias.fill_(0.0)
    data = TensorDataset(inputs.to(own), labels)
    predictions = model(inputs.to(own)).double()[:, 0]
    losses = LossScorer(model, loss="mse", progress=False).score(data).losses
    expected = (predictions - labels.double()).square().float()
    torch.testing.assert_close(losses, expected.detach())


@pytest.mark.parametrize("given", [torch.float32, torch.float64])
def test_an_input_that_is_taken_stays_beside_one_that_is_not(given):
    class Both(Since):
        def forward(self, times, shift):
            return super().forward(times) + self.head(shift)

    start = torch.tensor(1.7e9, dtype=torch.float64)
    shift = torch.randn(60, 2)
    times = start + torch.linspace(0, 6, 60, dtype=torch.float64)
    labels = torch.arange(60) % 3
    model = Both(start, torch.float32)
    expected = F.cross_entropy(model(times, shift), labels, reduction="none").detach()
    rows = [
        {"times": at, "shift": by.to(given), "labels": label}
        for at, by, label in zip(times, shift, labels, strict=True)
    ]
    losses = LossScorer(model, progress=False).score(rows).losses
    torch.testing.assert_close(losses, expected)


class Merging(nn.Linear):
    """Adds its adapter to its weight in eval mode, as loralib's layers do."""

    def __init__(self):
        super().__init__(4, 8)
        self.a, self.b = nn.Parameter(torch.randn(2, 4)), nn.Parameter(torch.randn(8, 2))
        self.is_merged = False

    def train(self, mode=True):
        super().train(mode)
        if mode == self.is_merged:
            sign = -1 if mode else 1
            self.weight.data += sign * (self.b @ self.a)
            self.is_merged = not mode
        return self

    def forward(self, x):
        more = 0 if self.is_merged else x @ self.a.T @ self.b.T
        return F.linear(x, self.weight, self.bias) + more


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_layers_that_change_their_weights_in_eval_mode_come_back_as_they_were(dtype):
    torch.manual_seed(0)
    model = nn.Sequential(Merging(), nn.ReLU(), nn.Linear(8, 3)).train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    data = TensorDataset(torch.randn(30, 4), torch.arange(30) % 3)
    expected = F.cross_entropy(model(data.tensors[0]), data.tensors[1], reduction="none").detach()
    losses = LossScorer(model, dtype=dtype, progress=False).score(data).losses
    torch.testing.assert_close(losses, expected, rtol=2e-2, atol=0.1 if dtype == "bfloat16" else 0)
    DriftMeter(model, data.tensors[0], dtype=dtype, progress=False)(model)
    compute_features(model, data, dtype=dtype, progress=False)
    assert not model[0].is_merged
    assert model[0].training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


class Counting(nn.Module):
    """Predicts 1, 2, 3, … by the positions that it holds, up to a thousand; odd ones the surer."""

    def __init__(self, size=1.0):
        super().__init__()
        self.weight = nn.Parameter(torch.full((16,), size))
        self.register_buffer("place", torch.arange(1024.0))

    def forward(self, input_ids):
        places = self.place[: input_ids.shape[1], None] + 1
        far = (places % 16 - torch.arange(16)).square() * (1 + places % 2)
        logits = -far.to(self.weight.dtype) * self.weight
        return CausalLMOutput(logits=logits.expand(len(input_ids), -1, -1))


def counted(length):
    labels = torch.arange(length) % 16
    return {"input_ids": torch.zeros(length, dtype=torch.long), "labels": labels}


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
@pytest.mark.parametrize("number", [10, 40])
def test_a_dtype_that_costs_a_model_its_positions_is_refused(number, dtype):
    longest = 900 if dtype == "bfloat16" else 60
    size = 1.0 if dtype == "bfloat16" else 1e5  # which is infinite in float16
    model, samples = Counting(size), [counted(40 + i) for i in range(number - 1)]
    samples.insert(3, counted(longest))
    exact = LossScorer(model, loss="causal_lm", dtype="float32", progress=False).score(samples)
    expected = [reference.causal_lm_sample_loss(model, sample) for sample in samples]
    torch.testing.assert_close(exact.losses, torch.tensor([loss for loss, _ in expected]))
    said = f"in {dtype} a sample's loss is .*more than rounding.*Pass dtype='float32'"
    with pytest.raises(ValueError, match=said):
        LossScorer(model, loss="causal_lm", dtype=dtype, progress=False).score(samples)
    own = Counting(size).to(getattr(torch, dtype))  # so it is meant to be
    assert len(LossScorer(own, loss="causal_lm", progress=False).score(samples)) == number


def test_drift_in_a_dtype_that_costs_a_model_its_positions_is_refused():
    samples = [counted(40 + i) for i in range(30)] + [counted(900)]
    assert DriftMeter(Counting(0.1), samples, progress=False)(Counting(0.05)).kl > 0.01
    with pytest.raises(ValueError, match=r"in bfloat16 a sample's prediction .*more than rounding"):
        DriftMeter(Counting(0.1), samples, dtype="bfloat16", progress=False)


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("given", [torch.float32, torch.bfloat16, torch.float64])
@pytest.mark.parametrize("dtype", ["auto", "float32", "bfloat16"])
def test_inputs_of_any_dtype_are_taken(own, given, dtype):
    torch.manual_seed(0)
    model = nn.Linear(4, 3).to(own)
    inputs, targets = torch.randn(6, 4).to(given), torch.tensor([0, 1, 2, 0, 1, 2])
    scorer = LossScorer(model, dtype=dtype, progress=False)
    losses = scorer.score(TensorDataset(inputs, targets)).losses
    expected = F.cross_entropy(
        F.linear(inputs.float(), model.weight.float(), model.bias.float()),
        targets,
        reduction="none",
    )
    torch.testing.assert_close(losses, expected, atol=3e-2, rtol=3e-2)
    assert not model._forward_pre_hooks
    assert model.weight.dtype == own


class Plain(nn.Module):
    """Two convolutions, BatchNorm, dropout and a head, each called by the network itself."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.first, self.second = nn.Conv2d(3, 4, 3), nn.Conv2d(4, 6, 3)
        self.norm, self.dropout, self.head = nn.BatchNorm2d(6), nn.Dropout(0.5), nn.Linear(6, 5)

    def normed(self, maps):
        return self.dropout(F.relu(self.norm(maps)))

    def flat(self, maps):
        return maps.mean((2, 3))

    def body(self, pixels):
        return self.flat(self.normed(self.second(self.first(pixels).relu())))

    def forward(self, pixels):
        return self.head(self.body(pixels))


class ByLambda(Plain):
    def __init__(self):
        super().__init__()
        self.normed = lambda maps: self.dropout(F.relu(self.norm(maps)))


class ByHook(Plain):
    def __init__(self):
        super().__init__()
        normed = super().normed
        self.second.register_forward_hook(lambda layer, args, maps: normed(maps))

    def normed(self, maps):
        return maps


class ByView(Plain):
    """PyTorch's own tutorial flattens so, which fails where channels come last."""

    def __init__(self):
        super().__init__()
        self.head = nn.Linear(6 * 16, 5)

    def flat(self, maps):
        return maps.view(-1, 6 * 16)


class ByReshape(ByView):
    def flat(self, maps):
        return maps.reshape(-1, 6 * 16)


class Body(nn.Module):
    def __init__(self, model):
        super().__init__()
        self.model = model

    def forward(self, pixels):
        return self.model.body(pixels)


def trained(kind, shift=0.0):
    """A network with statistics that are not 0 and 1."""
    model = kind().train()
    for _ in range(5):
        model(2 * images().tensors[0] + 1)
    with torch.no_grad():
        model.head.weight.add_(shift)
    return model


def drift_of(kind, data):
    return DriftMeter(trained(kind), [{"x": row} for row in data.tensors[0]], progress=False)(
        trained(kind, shift=torch.linspace(0, 0.3, 5)[:, None])
    )


@pytest.mark.parametrize("mode", [True, False])
@pytest.mark.parametrize(
    ("kind", "plain"), [(ByLambda, Plain), (ByHook, Plain), (ByView, ByReshape)]
)
def test_code_that_knows_nothing_of_a_copy_gives_what_the_model_gives(kind, plain, mode):
    data = images()
    pixels, targets = data.tensors
    reference = trained(plain).eval()
    expected = F.cross_entropy(reference(pixels), targets, reduction="none").detach()
    for dtype, near in (("float32", 1e-5), ("bfloat16", 5e-2)):
        model = trained(kind).train(mode)
        state = {name: value.clone() for name, value in model.state_dict().items()}
        losses = LossScorer(model, dtype=dtype, progress=False).score(data).losses
        assert torch.allclose(losses, expected, atol=near, rtol=near)
        options = {"dtype": dtype, "batch_size": 7, "progress": False}
        features, _ = compute_features(Body(model).train(mode), data, **options)
        assert torch.allclose(features, reference.body(pixels), atol=near, rtol=near)
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())
        assert all(module.training == mode for module in model.modules())
    assert drift_of(kind, data).kl == pytest.approx(drift_of(plain, data).kl, rel=1e-3)


class Rows(nn.Module):
    """Views channels as samples, which fails where channels come last unless there is one image."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.Conv2d(8, 8, 3))

    def forward(self, pixels):
        maps = self.layers(pixels)
        return maps.view(len(pixels) * 8, *maps.shape[2:]).sum((1, 2)).view(-1, 8)


def test_a_layout_depends_on_the_call_alone_and_other_errors_are_not_met_by_another_one():
    one, two = torch.randn(1, 3, 8, 8), torch.randn(2, 3, 8, 8)
    found = []
    for order in ([one, two, one], [two, one, two]):
        with frozen_model(Rows(), torch.float32, CPU) as lent:
            outputs = [lent(batch) for batch in order]
        assert torch.equal(outputs[0], outputs[2])
        found.append(outputs[:2])
    assert torch.equal(found[0][0], found[1][1])
    assert torch.equal(found[0][1], found[1][0])
    torch.testing.assert_close(found[0][1], Rows()(two), rtol=1e-4, atol=1e-4)
    model, calls = ByReshape(), []
    model.head = nn.Linear(7, 5)
    model.first.register_forward_hook(lambda *_: calls.append(1))
    with frozen_model(model, torch.float32, CPU) as lent:
        with pytest.raises(RuntimeError, match="shapes cannot be multiplied"):
            lent(two)
        assert len(calls) == 1


class Windows(Plain):
    """Takes overlapping windows by the strides of contiguous maps."""

    def flat(self, maps):
        images, channels, height, width = maps.shape
        strides = channels * height * width, height * width, width, 1, width, 1
        shape = images, channels, height - 1, width - 1, 2, 2
        return maps.as_strided(shape, strides).amax((-1, -2)).mean((2, 3))


class Asserts(Plain):
    def flat(self, maps):
        assert maps.is_contiguous()
        return super().flat(maps)


@pytest.mark.parametrize("number", [1, 16])
def test_a_blank_first_image_tells_nothing_of_layouts(number):
    torch.manual_seed(0)
    model, pixels = Windows().eval(), torch.randn(80, 3, 8, 8)
    pixels[:number] = 0
    labels = torch.arange(80) % 5
    with torch.no_grad():
        outputs = torch.cat([model(each[None]) for each in pixels])
    features, _ = compute_features(
        model, TensorDataset(pixels, labels), batch_size=number, progress=False
    )
    torch.testing.assert_close(features, outputs, rtol=1e-4, atol=1e-4)
    losses = LossScorer(model, progress=False).score(TensorDataset(pixels, labels)).losses
    expected = F.cross_entropy(outputs, labels, reduction="none")
    torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-4)


class InPlace(ByView):
    """Normalises its input where it lies."""

    def body(self, pixels):
        pixels -= 0.5
        pixels *= 3
        return super().body(pixels)


@pytest.mark.parametrize("kind", [Windows, Asserts, InPlace])
@pytest.mark.parametrize("loss", ["cross_entropy", "callable"])
@pytest.mark.parametrize(("dtype", "near"), [("float32", 1e-5), ("bfloat16", 5e-2)])
def test_code_that_counts_on_strides_or_changes_its_input_is_run_as_written(
    kind, loss, dtype, near
):
    data, model = images(), trained(kind).eval()
    pixels, targets = data.tensors
    with torch.no_grad():
        expected = F.cross_entropy(model(pixels.clone()), targets, reduction="none")
    data = TensorDataset(pixels, targets)

    def own(lent, batch):
        return F.cross_entropy(lent(batch[0].clone()), batch[1], reduction="none")

    options = {"dtype": dtype, "batch_size": 7, "progress": False}
    losses = LossScorer(model, own if loss == "callable" else loss, **options).score(data).losses
    assert torch.allclose(losses, expected, atol=near, rtol=near)


def test_a_function_may_call_parts_that_view_their_maps():
    data, model = images(), trained(ByView).eval()

    def own(lent, batch):
        return F.cross_entropy(lent.head(lent.body(batch[0])), batch[1], reduction="none")

    losses = LossScorer(model, own, dtype="float32", progress=False).score(data).losses
    assert torch.allclose(losses, own(model, data.tensors).detach(), atol=1e-5)


def test_maps_that_a_network_returns_are_contiguous():
    maps = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Conv2d(4, 5, 3))
    data = TensorDataset(torch.randn(6, 3, 8, 8), torch.randint(0, 5, (6, 4, 4)))

    def loss(model, batch):
        logits = model(batch[0]).view(len(batch[0]), -1).view(len(batch[0]), 5, -1)
        return F.cross_entropy(logits, batch[1].view(len(logits), -1), reduction="none").mean(1)

    losses = LossScorer(maps, loss, progress=False).score(data).losses
    assert torch.allclose(losses, loss(maps, data.tensors).detach(), atol=1e-5)


def test_products_of_low_precision_do_not_reach_into_scores_or_drift():
    model, samples = tiny_llama(), token_samples(12)

    def measured():
        scores = LossScorer(model, dtype="float32", progress=False).score(samples)
        return scores.losses, DriftMeter(model, samples, dtype="float32")(moved(model)).kl

    losses, kl = measured()
    torch.set_float32_matmul_precision("medium")
    try:
        low = measured()
        assert torch.get_float32_matmul_precision() == "medium"
    finally:
        torch.set_float32_matmul_precision("highest")
    torch.testing.assert_close(low[0], losses, rtol=1e-6, atol=1e-6)
    assert low[1] == pytest.approx(kl, rel=1e-4)
