import re

import numpy as np
import pytest
import torch
from torch import nn

from flowdata._common import progress
from flowdata.probe.fit import fit_head
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
    z = (x - x.mean(0)) / x.std(0, correction=0)
    model = linear_model.LogisticRegression(C=1 / (300 * 0.01), tol=1e-9, max_iter=5000)
    model.fit(z.double().numpy(), y.numpy())
    head = fit_head(nn.Linear(20, 5).double(), x.double(), y, strength=0.01)
    ours = torch.log_softmax(head(x.double()), 1).detach()
    np.testing.assert_allclose(ours, model.predict_log_proba(z.double().numpy()), atol=1e-4)


def test_features_are_fitted_slice_by_slice_as_in_one_piece(monkeypatch):
    x, y = blobs()
    whole = fit_head(nn.Linear(3, 3), x, y, strength=0.01)
    monkeypatch.setattr("flowdata.probe.problem.ROWS", 7)
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
    held_out = new.pop("held_out")
    assert held_out < 1.2 * min(new.values())
    assert held_out < 0.5 * max(new.values())


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


def test_a_solution_that_was_not_reached_warns(monkeypatch, caplog):
    monkeypatch.setattr("flowdata.probe.fit._TOLERANCE", 1e-40)
    x, y = blobs()
    fit_head(nn.Linear(3, 3), x, y, strength=0.1)
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flowdata", "WARNING")
    assert re.search(
        r"did not converge at strength=0\.1: gradient \S+, wanted \S+; a larger strength",
        record.getMessage(),
    )


X, Y = blobs(samples=12)
BAD = [
    (nn.Linear(3, 2), X, Y, {}, r"targets\[2\] is 2: no class of a head with 2 outputs \(4 of 12"),
    (nn.Linear(4, 3), X, Y, {}, r"shape \(N, 4\), the head's in_features; got .*\(12, 3\)"),
    (nn.Linear(3, 3), X, Y[:5], {}, "targets must be as many as features, 12 > 0; got 5"),
    (nn.Linear(3, 3), X[:0], Y[:0], {}, "0 > 0; got 0"),
    (nn.Linear(3, 3), X, Y, {"strength": -1.0}, "strength must be 'held_out' or a float >= 0"),
    (nn.Linear(3, 3), X, Y, {"strength": "cv"}, "got 'cv'"),
    (nn.Linear(3, 3), X, Y, {"folds": 1}, "folds must be an integer of at least 2, got 1"),
    (nn.Linear(3, 3), X, Y, {"strength": 0.1, "folds": 1}, "folds must be an integer of at least"),
    (nn.Linear(3, 3), X, Y, {"folds": 2.5}, "at least 2, got 2.5"),
    (nn.Linear(3, 3), X, Y, {"strength": None}, "got None"),
    (nn.Linear(3, 3), X, Y, {"strength": float("nan")}, "got nan"),
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


@pytest.mark.parametrize("shown", [True, False])
def test_fits_that_take_long_show_their_progress(shown, capsys, monkeypatch):
    features, targets = torch.randn(60, 3), torch.arange(60) % 2
    fit_head(nn.Linear(3, 2), features, targets)
    assert capsys.readouterr().err == ""  # not of quick ones
    monkeypatch.setattr(progress, "_FIRST_LINE", 0.0)
    fit_head(nn.Linear(3, 2), features, targets, progress=shown)
    lines = capsys.readouterr().err.splitlines()
    assert bool(lines) == shown
    assert not shown or lines[-1].startswith("head: choosing its strength: 135 of 135 fits (100%)")
