import logging
import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from flowdata.drift import DriftMeter
from flowdata.errors import ScoreMismatchError, StoreError
from flowdata.probe.features import compute_features
from flowdata.probe.linear_probe import linear_probe
from tests.test_fit import blobs
from tests.test_linear_probe import quiet


class Body(nn.Module):
    """BatchNorm and dropout: wrong features, and changed statistics, unless in eval mode."""

    def __init__(self):
        super().__init__()
        self.layers = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8), nn.ReLU(), nn.Dropout(0.5))

    def forward(self, x):
        return self.layers(x)


def test_features_are_those_of_the_body_in_eval_mode():
    torch.manual_seed(0)
    x, y = blobs()
    body = Body()
    body(x)  # statistics that are not 0 and 1
    features, targets = compute_features(
        body, TensorDataset(x, y), batch_size=7, dtype="float32", progress=False
    )
    body.eval()
    torch.testing.assert_close(features, torch.cat([body(row[None]) for row in x]).detach())
    assert torch.equal(targets, y)


class Shifted(nn.Module):
    """Has a plain tensor of float32, which nothing converts."""

    def __init__(self):
        super().__init__()
        self.shift, self.linear = torch.ones(3), nn.Linear(3, 2)

    def forward(self, x):
        return self.linear(x - self.shift)


class FailsAtLast(nn.Linear):
    def forward(self, x):
        if len(x) < 64:
            raise RuntimeError("a short batch")
        return super().forward(x)


def test_features_show_what_is_run(capsys):
    compute_features(nn.Linear(3, 2), TensorDataset(torch.randn(7, 3), torch.zeros(7)))
    assert "features: running the body: 7 of 7 samples (100%)" in capsys.readouterr().err


def test_a_body_that_does_not_run_in_a_dtype_is_told_which_it_runs_in():
    data = TensorDataset(torch.randn(70, 3), torch.zeros(70))
    options = {"batch_size": 64, "progress": False}
    with pytest.raises(ValueError, match=r"not run in bfloat16 .*dtype='float32'"):
        compute_features(Shifted(), data, dtype="bfloat16", **options)
    assert len(compute_features(Shifted(), data, dtype="float32", **options)[0]) == 70
    with pytest.raises(RuntimeError, match="a short batch"):  # in every dtype
        compute_features(FailsAtLast(3, 2), data, dtype="bfloat16", **options)


def test_images_of_bytes_are_refused_with_what_to_do():
    body = nn.Sequential(nn.Conv2d(3, 4, 3), nn.Flatten())
    pixels = torch.randint(0, 256, (6, 3, 8, 8)).byte()
    message = r"fails on the first samples .* pixels of uint8: convert .*as by \.float\(\) / 255"
    for dtype in ("auto", "float32", "bfloat16"):
        with pytest.raises(ValueError, match=message):
            compute_features(body, TensorDataset(pixels, torch.zeros(6)), dtype=dtype)


def test_features_in_bfloat16_are_float32_and_close():
    torch.manual_seed(0)
    x, y = blobs()
    body = nn.Linear(3, 4)
    features, _ = compute_features(body, TensorDataset(x, y), dtype="bfloat16", progress=False)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, body(x).detach(), atol=0.1, rtol=0.02)
    assert not torch.equal(features, body(x).detach())


@pytest.mark.parametrize("own", [torch.float32, torch.bfloat16, torch.float64])
def test_features_are_of_the_bodys_own_dtype_whatever_the_machine_is_fast_at(monkeypatch, own):
    monkeypatch.setattr("flowdata.models.precision.is_fast_at_bfloat16", lambda device: True)
    torch.manual_seed(0)
    x, y = blobs()
    body = nn.Linear(3, 4).to(own)
    features, _ = compute_features(body, TensorDataset(x, y), progress=False)
    expected = body(x.to(own)).detach()
    assert torch.equal(features, expected if own == torch.float64 else expected.float())


class Noisy(Dataset):
    """Draws from every global generator, as an augmenting transform does."""

    def __init__(self, x, y):
        self.x, self.y = x, y

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        random.random(), np.random.rand(), torch.rand(1)  # noqa: NPY002
        return self.x[index], self.y[index]


def test_the_model_and_the_random_state_come_back_untouched():
    torch.manual_seed(0)
    x, y = blobs()
    body = Body()
    body.layers[3].eval()  # a mixture of modes
    body(x).sum().backward()
    body.layers[0].bias.requires_grad_(False)
    flags = [module.training for module in body.modules()]
    grads = [p.grad.clone() for p in body.parameters()]
    state = {name: value.clone() for name, value in body.state_dict().items()}
    head = nn.Linear(8, 3)
    generators = random.getstate(), np.random.get_state()[1].copy(), torch.get_rng_state()  # noqa: NPY002
    quiet(head, Noisy(x, y), body, strength=0.1)
    assert head.weight.grad is None
    assert head.weight.requires_grad
    assert flags == [module.training for module in body.modules()]
    assert all(torch.equal(p.grad, grad) for p, grad in zip(body.parameters(), grads, strict=True))
    assert not body.layers[0].bias.requires_grad
    assert all(torch.equal(value, state[name]) for name, value in body.state_dict().items())
    assert random.getstate() == generators[0]
    assert (np.random.get_state()[1] == generators[1]).all()  # noqa: NPY002
    assert torch.equal(torch.get_rng_state(), generators[2])


class TwoInputs(nn.Module):
    def forward(self, left, right):
        return torch.cat([left, right], 1)


def test_inputs_may_be_tuples_or_mappings():
    x, y = blobs()
    tuples = [((row[:1], row[1:]), label) for row, label in zip(x, y, strict=True)]
    dicts = [
        {"left": row[:1], "right": row[1:], "labels": label}
        for row, label in zip(x, y, strict=True)
    ]
    plain = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    for dataset in (tuples, dicts):
        head = quiet(nn.Linear(3, 3), dataset, TwoInputs(), strength=0.05)
        assert torch.equal(head.weight, plain.weight)


def test_bad_batches_are_named():
    x, y = blobs()
    with pytest.raises(TypeError, match=r"head must be an nn\.Linear, got Identity"):
        quiet(nn.Identity(), TensorDataset(x, y))
    with pytest.raises(TypeError, match=r"batches .inputs, targets. .* got list"):
        quiet(nn.Linear(3, 3), TensorDataset(x))
    with pytest.raises(ValueError, match="dataset is empty"):
        quiet(nn.Linear(3, 3), [])
    with pytest.raises(ValueError, match=r"features of shape \(B, D\); got \(60, 3, 1\)"):
        quiet(nn.Linear(3, 3), TensorDataset(x, y), nn.Unflatten(1, (3, 1)))


def test_a_model_left_mid_pass_by_an_error_gets_its_flags_back():
    body = Body()
    with pytest.raises(ValueError, match="the model fails on the first samples"):
        quiet(nn.Linear(8, 3), TensorDataset(torch.zeros(4, 5), torch.zeros(4).long()), body)
    assert all(module.training for module in body.modules())


def features_kept_in(file, model=None, **options):
    x, y = blobs()
    model = model or nn.Linear(3, 2)
    return compute_features(model, TensorDataset(x, y), store=file, progress=False, **options)


class Counting(nn.Linear):
    calls = 0

    def forward(self, x):
        Counting.calls += 1
        return super().forward(x)


def test_features_are_kept_and_read_without_running_the_body(tmp_path):
    torch.manual_seed(0)
    body, file = Counting(3, 2), tmp_path / "new" / "features.safetensors"
    Counting.calls = 0
    first = features_kept_in(file, body, dtype="float32")
    calls = Counting.calls  # one of all samples, and those of the check before
    assert calls > 0
    second = features_kept_in(str(file), body, dtype="float32", batch_size=7)
    assert Counting.calls == calls
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = features_kept_in(None, body, dtype="float32")
    assert all(torch.equal(a, b) for a, b in zip(first, plain, strict=True))
    x, y = blobs()
    heads = [
        quiet(nn.Linear(2, 3), TensorDataset(x, y), body, store=store, dtype="float32")
        for store in (file, None)
    ]
    assert torch.equal(heads[0].weight, heads[1].weight)


def test_features_of_another_body_data_set_or_dtype_are_refused(tmp_path):
    torch.manual_seed(0)
    x, y = blobs(seed=1)
    body, file = nn.Linear(3, 2), tmp_path / "f.safetensors"
    features_kept_in(file, body, dtype="float32")
    before = file.read_bytes()
    with pytest.raises(ScoreMismatchError, match=r"another body.*Name another file"):
        features_kept_in(file, nn.Linear(3, 2), dtype="float32")
    with pytest.raises(ScoreMismatchError, match="another dtype"):
        features_kept_in(file, body, dtype="bfloat16")
    with pytest.raises(ScoreMismatchError, match="another data set"):
        compute_features(body, TensorDataset(x, y), store=file, dtype="float32", progress=False)
    assert file.read_bytes() == before


def test_a_data_set_may_be_named_by_its_user(tmp_path):
    body, file = nn.Linear(3, 2), tmp_path / "f.safetensors"
    first = features_kept_in(file, body, dataset_id="blobs", dtype="float32")
    x, y = blobs(seed=5)
    again = compute_features(
        body, TensorDataset(x, y), store=file, dataset_id="blobs", dtype="float32", progress=False
    )
    assert torch.equal(first[0], again[0])


def test_a_name_of_what_is_not_kept_is_refused():
    data, body = TensorDataset(*blobs(seed=5)), nn.Linear(3, 3)
    for call in (
        lambda: compute_features(body, data, dataset_id="blobs"),
        lambda: linear_probe(body, nn.Linear(3, 3), data, dataset_id="blobs"),
        lambda: DriftMeter(body, data.tensors[0], dataset_id="blobs"),
    ):
        with pytest.raises(ValueError, match=r"dataset_id='blobs' names .* be ignored without it"):
            call()


def test_a_damaged_or_foreign_file_is_neither_read_nor_overwritten(tmp_path):
    file = tmp_path / "f.safetensors"
    body = nn.Linear(3, 2)
    features_kept_in(file, body)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        features_kept_in(file, body)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="not written by flowdata"):
        features_kept_in(tmp_path / "other.safetensors", body)
    assert file.read_bytes() == bytes(content)
    with pytest.raises(ValueError, match=r"store must name a file \*\.safetensors"):
        features_kept_in(tmp_path / "folder", body)


def test_a_body_whose_parameters_are_offloaded_is_run_where_it_takes_its_inputs():
    accelerate = pytest.importorskip("accelerate")
    torch.manual_seed(0)
    x, y = blobs()
    body = Body().eval()
    data = TensorDataset(x, y)
    plain, _ = compute_features(body, data, dtype="float32", progress=False)
    offloaded = accelerate.cpu_offload(body, execution_device="cpu")
    assert next(offloaded.parameters()).device.type == "meta"
    features, targets = compute_features(offloaded, data, dtype="float32", progress=False)
    assert torch.equal(features, plain)
    assert torch.equal(targets, y)


class Pool(nn.Module):
    """Takes the mean over all positions, those of padding, or of all samples, among them."""

    def __init__(self, over=1):
        super().__init__()
        torch.manual_seed(0)
        self.embedding, self.over = nn.Embedding(20, 6), over

    def forward(self, input_ids):
        vectors = self.embedding(input_ids)
        return vectors.mean(1) - 0.2 * vectors.mean((0, 1)) * (self.over == 0)


def texts(count=40):
    generator = torch.Generator().manual_seed(0)
    lengths = [3 + place // 4 % 5 for place in range(count)]
    return [
        {
            "input_ids": torch.randint(1, 20, (n,), generator=generator),
            "labels": torch.tensor(n % 2),
        }
        for n in lengths
    ]


def padded(samples):
    ids = [sample["input_ids"] for sample in samples]
    return {
        "input_ids": nn.utils.rnn.pad_sequence(ids, batch_first=True),
        "labels": torch.stack([sample["labels"] for sample in samples]),
    }


def bare_norm():
    torch.manual_seed(0)
    norm = nn.BatchNorm2d(4, track_running_stats=False)
    return nn.Sequential(nn.Conv2d(3, 4, 3), norm, nn.ReLU(), nn.Flatten())


def ramps():
    x = torch.randn(30, 3, 6, 6, generator=torch.Generator().manual_seed(0))
    return TensorDataset(x + torch.arange(30)[:, None, None, None] / 9, torch.arange(30) // 10)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(
    ("make", "data", "collate", "words"),
    [
        (bare_norm, ramps(), None, "each sample is run alone"),
        (Pool, texts(), padded, "neighbours of one shape are run together"),
        (lambda: Pool(over=0), texts(), padded, "each sample is run alone"),
        (Body, TensorDataset(*blobs()), None, ""),
    ],
)
def test_features_are_those_of_each_sample_alone(
    tmp_path, caplog, make, data, collate, words, dtype
):
    body = make()
    alone = collate or torch.utils.data.default_collate
    batches = [alone([sample]) for sample in data]
    inputs = [b["input_ids"] if isinstance(b, dict) else b[0] for b in batches]
    with torch.no_grad():
        expected = torch.cat([body.eval()(each) for each in inputs])
    near = 1e-5 if dtype == "float32" else 5e-2
    options = {"dtype": dtype, "collate_fn": collate, "progress": False}
    with caplog.at_level(logging.WARNING, "flowdata"):
        for size in (20, 7):
            for store in (None, tmp_path / "f.safetensors"):
                found, _ = compute_features(body, data, batch_size=size, store=store, **options)
                torch.testing.assert_close(found, expected, atol=near, rtol=near)
    change = "samples of a batch change each other's features"
    assert (change in caplog.text) == bool(words)
    assert words in caplog.text


def test_a_body_that_runs_on_no_sample_alone_is_refused_or_said(caplog):
    body = nn.Sequential(nn.Linear(3, 8), nn.BatchNorm1d(8, track_running_stats=False))
    data = TensorDataset(*blobs())
    with pytest.raises(ValueError, match=r"\(1\): a sample's vector of features depends .*=True$"):
        compute_features(body, data, progress=False)

    class OfTwo(nn.Linear):
        def forward(self, x):
            if len(x) < 2:
                raise RuntimeError("two are needed")
            return super().forward(x)

    with caplog.at_level(logging.WARNING, "flowdata"):
        assert len(compute_features(OfTwo(3, 2), data, progress=False)[0]) == len(data)
    assert "fails on a sample alone (two are needed)" in caplog.text


def test_samples_that_make_no_batch_are_explained():
    with pytest.raises(ValueError, match=r"can't be stacked .* pass a collate_fn that makes"):
        compute_features(Pool(), texts(), progress=False)
    one_length = texts()[:4]
    assert compute_features(Pool(), one_length, progress=False)[0].shape == (4, 6)
