import random

import numpy as np
import pytest
import torch
from safetensors.torch import save_file
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from flowdata.features import compute_features
from flowdata.heads import fit_head
from flowdata.probe import linear_probe
from flowdata.scores import ScoreMismatchError
from flowdata.store_files import StoreError
from tests import reference


def blobs(samples=60, features=3, classes=3, seed=0):
    """Overlapping classes: separable ones have no finite solution without a penalty."""
    generator = torch.Generator().manual_seed(seed)
    targets = torch.arange(samples) % classes
    centres = torch.randn(classes, features, generator=generator)
    x = centres[targets] + torch.randn(samples, features, generator=generator)
    return 5 * x + 3, targets


def multi_label(x):
    return torch.stack([x[:, 0] > 3, x.sum(1) > 10], 1)


def quiet(head, dataset, model=None, **options):
    return linear_probe(model or nn.Identity(), head, dataset, progress=False, **options)


@pytest.mark.parametrize("strength", [0.01, 0.3])
def test_classes_match_plain_gradient_descent(strength):
    x, y = blobs()
    head = fit_head(nn.Linear(3, 3), x, y, strength=strength)
    weight, bias = reference.linear_probe(x, y, strength, "cross_entropy")
    np.testing.assert_allclose(head.weight.detach(), weight, atol=1e-5)
    np.testing.assert_allclose(head.bias.detach(), bias, atol=1e-5)


def test_multi_label_matches_plain_gradient_descent():
    x, _ = blobs()
    y = multi_label(x)
    head = fit_head(nn.Linear(3, 2), x, y, strength=0.02)
    weight, bias = reference.linear_probe(x, y, 0.02, "binary_cross_entropy")
    np.testing.assert_allclose(head.weight.detach(), weight, atol=1e-5)
    np.testing.assert_allclose(head.bias.detach(), bias, atol=1e-5)


def test_regression_matches_plain_gradient_descent_and_least_squares():
    x, _ = blobs()
    y = torch.stack([x[:, 0] - x[:, 1], x[:, 2] ** 2], 1)
    head = fit_head(nn.Linear(3, 2), x, y, strength=0.1)
    weight, bias = reference.linear_probe(x, y, 0.1, "mse")
    np.testing.assert_allclose(head.weight.detach(), weight, atol=1e-4)
    np.testing.assert_allclose(head.bias.detach(), bias, atol=1e-3)

    head = fit_head(nn.Linear(3, 2), x, y, strength=0.0)
    exact = torch.linalg.lstsq(torch.cat([x, torch.ones(len(x), 1)], 1).double(), y.double())
    np.testing.assert_allclose(head.weight.detach(), exact.solution[:3].T, atol=1e-4)
    np.testing.assert_allclose(head.bias.detach(), exact.solution[3], atol=1e-3)


def test_classes_match_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(samples=300, features=20, classes=5)
    z = (x - x.mean(0)) / x.var(0, correction=0).mean().sqrt()
    model = linear_model.LogisticRegression(C=1 / (300 * 0.01), tol=1e-9, max_iter=5000)
    model.fit(z.double().numpy(), y.numpy())
    head = fit_head(nn.Linear(20, 5).double(), x.double(), y, strength=0.01)
    ours = torch.log_softmax(head(x.double()), 1).detach()
    np.testing.assert_allclose(ours, model.predict_log_proba(z.double().numpy()), atol=1e-4)


def test_features_are_fitted_slice_by_slice_as_in_one_piece(monkeypatch):
    x, y = blobs()
    whole = fit_head(nn.Linear(3, 3), x, y, strength=0.01)
    monkeypatch.setattr("flowdata.heads._ROWS", 7)
    sliced = fit_head(nn.Linear(3, 3), x, y, strength=0.01)
    torch.testing.assert_close(sliced.weight, whole.weight, atol=1e-6, rtol=1e-6)


def test_the_held_out_strength_is_as_good_as_the_best_one_tried():
    x, y = blobs(samples=80, features=40, classes=2, seed=3)
    new_x, new_y = blobs(samples=2000, features=40, classes=2, seed=3)
    new_x = new_x + torch.randn(new_x.shape, generator=torch.Generator().manual_seed(9))
    new = {}
    for strength in (1.0, 0.1, 0.01, 1e-3, 1e-4, "held_out"):
        head = fit_head(nn.Linear(40, 2), x, y, strength=strength)
        new[strength] = nn.functional.cross_entropy(head(new_x), new_y).item()
    chosen = new.pop("held_out")
    assert chosen < 1.2 * min(new.values())
    assert chosen < 0.5 * max(new.values())


def test_a_constant_feature_gets_no_weight_and_a_rare_one_no_large_weight():
    x, y = blobs()
    rare = torch.zeros(len(x), 1)
    rare[0] = 1e-3
    head = fit_head(nn.Linear(5, 3), torch.cat([x, torch.full_like(rare, 0.1), rare], 1), y)
    assert head.weight[:, 3].abs().max() < 1e-6
    assert head.weight[:, 4].abs().max() < head.weight[:, :3].abs().max()


def test_a_head_without_bias_is_fitted_without_one():
    x, _ = blobs()
    head = fit_head(nn.Linear(3, 1, bias=False), x, x[:, :1] + 2 * x[:, 1:2], strength=0.0)
    torch.testing.assert_close(head.weight, torch.tensor([[1.0, 2.0, 0.0]]), atol=1e-5, rtol=0)


def test_targets_decide_the_loss_and_a_named_one_overrules():
    x, y = blobs()

    def weight(targets, loss="auto"):
        return fit_head(nn.Linear(3, 1), x, targets, loss=loss, strength=0.1).weight

    yes = (y > 0).float()
    logistic = weight(yes, "binary_cross_entropy")
    assert all(torch.equal(weight(t), logistic) for t in (yes, yes.bool(), yes.long()[:, None]))
    assert torch.equal(weight(yes + 1), weight(yes + 1, "mse"))
    assert not torch.allclose(weight(yes, "mse"), logistic)


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


def test_features_in_bfloat16_are_float32_and_close():
    torch.manual_seed(0)
    x, y = blobs()
    body = nn.Linear(3, 4)
    features, _ = compute_features(body, TensorDataset(x, y), dtype="bfloat16", progress=False)
    assert features.dtype == torch.float32
    torch.testing.assert_close(features, body(x).detach(), atol=0.1, rtol=0.02)
    assert not torch.equal(features, body(x).detach())


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


def test_the_result_does_not_depend_on_the_heads_first_values_nor_on_grad_mode():
    x, y = blobs()
    torch.manual_seed(1)
    first = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    torch.manual_seed(2)
    with torch.no_grad():
        second = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    assert torch.equal(first.weight, second.weight)


def test_the_head_is_filled_in_place_and_keeps_its_dtype():
    x, y = blobs()
    head = nn.Linear(3, 3, dtype=torch.bfloat16)
    weight = head.weight
    assert quiet(head, TensorDataset(x, y), strength=0.05) is head
    assert head.weight is weight
    assert (head(x.bfloat16()).argmax(1) == y).float().mean() > 0.5


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


def test_a_second_round_on_a_changed_body_fits_that_body():
    torch.manual_seed(0)
    x, y = blobs()
    body, head = nn.Linear(3, 3), nn.Linear(3, 3)
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    before = head(body(x)).argmax(1)
    with torch.no_grad():
        body.weight.neg_()
        body.bias.neg_()
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    assert torch.equal(head(body(x)).argmax(1), before)


def test_large_regression_targets_converge_as_small_ones_do():
    x, _ = blobs()
    y = x[:, :1] ** 2
    small = fit_head(nn.Linear(3, 1).double(), x.double(), y.double(), strength=0.01)
    large = fit_head(nn.Linear(3, 1).double(), x.double(), 1e9 * y.double(), strength=0.01)
    torch.testing.assert_close(large.weight, 1e9 * small.weight, rtol=1e-4, atol=0)


def test_classes_that_can_be_separated_get_a_finite_head():
    x = torch.linspace(-1, 1, 10)[:, None]
    head = fit_head(nn.Linear(1, 2), x, (x[:, 0] > 0).long(), strength=0.0)
    assert head.weight.isfinite().all()
    assert torch.equal(head(x).argmax(1), (x[:, 0] > 0).long())


def test_a_solution_that_was_not_reached_warns(monkeypatch):
    monkeypatch.setattr("flowdata.heads._TOLERANCE", 1e-40)
    x, y = blobs()
    with pytest.warns(UserWarning, match="did not converge at strength=0.1"):
        fit_head(nn.Linear(3, 3), x, y, strength=0.1)


X, Y = blobs(samples=12)
BAD = [
    (nn.Linear(3, 2), X, Y, {}, r"targets\[2\] is 2: no class of a head with 2 outputs \(4 of 12"),
    (nn.Linear(4, 3), X, Y, {}, r"shape \(N, 4\), the head's in_features; got .*\(12, 3\)"),
    (nn.Linear(3, 3), X, Y[:5], {}, "targets must be as many as features, 12 > 0; got 5"),
    (nn.Linear(3, 3), X[:0], Y[:0], {}, "0 > 0; got 0"),
    (nn.Linear(3, 3), X, Y, {"strength": -1.0}, "strength must be 'held_out' or a float >= 0"),
    (nn.Linear(3, 3), X, Y, {"strength": "cv"}, "got 'cv'"),
    (nn.Linear(3, 3), X, Y, {"folds": 13}, "between 2 and the number of samples, 12; got 13"),
    (nn.Linear(3, 3), X, Y, {"loss": "hinge"}, "loss must be 'auto' or one of .* got 'hinge'"),
    (nn.Linear(3, 3), X, Y.float(), {"loss": "cross_entropy"}, "must be integer classes"),
    (nn.Linear(3, 2), X, Y.float(), {}, r"'mse' must have shape \(12, 2\).* got \(12,\)"),
    (
        nn.Linear(3, 1),
        X,
        Y.float(),
        {"loss": "binary_cross_entropy"},
        r"targets\[2\] neither 0 nor",
    ),
    (nn.Linear(3, 1), X, Y / (Y - 1), {}, r"targets\[1\] not finite"),
    (nn.Linear(3, 3), X / (X * 0 + (torch.arange(12) != 4)[:, None]), Y, {}, r"features\[4\] not"),
]


@pytest.mark.parametrize(("head", "features", "targets", "options", "message"), BAD)
def test_bad_input_is_named_and_leaves_the_head_alone(head, features, targets, options, message):
    before = head.weight.clone()
    with pytest.raises(ValueError, match=message):
        fit_head(head, features, targets, **options)
    assert torch.equal(head.weight, before)


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
    with pytest.raises(RuntimeError):
        quiet(nn.Linear(8, 3), TensorDataset(torch.zeros(4, 5), torch.zeros(4).long()), body)
    assert all(module.training for module in body.modules())


# --- features kept on disk -------------------------------------------------------------------


def kept(file, model=None, **options):
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
    first = kept(file, body, dtype="float32")
    assert Counting.calls == 1
    second = kept(str(file), body, dtype="float32", batch_size=7)
    assert Counting.calls == 1
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))
    plain = kept(None, body, dtype="float32")
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
    kept(file, body, dtype="float32")
    before = file.read_bytes()
    with pytest.raises(ScoreMismatchError, match=r"another body .*Name another file"):
        kept(file, nn.Linear(3, 2), dtype="float32")
    with pytest.raises(ScoreMismatchError, match="another dtype"):
        kept(file, body, dtype="bfloat16")
    with pytest.raises(ScoreMismatchError, match="another dataset"):
        compute_features(body, TensorDataset(x, y), store=file, dtype="float32", progress=False)
    assert file.read_bytes() == before


def test_a_data_set_may_be_named_by_its_user(tmp_path):
    body, file = nn.Linear(3, 2), tmp_path / "f.safetensors"
    first = kept(file, body, dataset_id="blobs", dtype="float32")
    x, y = blobs(seed=5)
    again = compute_features(
        body, TensorDataset(x, y), store=file, dataset_id="blobs", dtype="float32", progress=False
    )
    assert torch.equal(first[0], again[0])


def test_a_damaged_or_foreign_file_is_neither_read_nor_overwritten(tmp_path):
    file = tmp_path / "f.safetensors"
    body = nn.Linear(3, 2)
    kept(file, body)
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    with pytest.raises(StoreError, match="damaged"):
        kept(file, body)
    save_file({"a": torch.zeros(1)}, tmp_path / "other.safetensors")
    with pytest.raises(StoreError, match="not written by flowdata"):
        kept(tmp_path / "other.safetensors", body)
    assert file.read_bytes() == bytes(content)
    with pytest.raises(ValueError, match=r"store must name a file \*\.safetensors"):
        kept(tmp_path / "folder", body)
