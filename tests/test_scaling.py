"""Columns of every scale, mean and kind: the head is that of the columns standardised by hand."""

import numpy as np
import pytest
import torch
from torch import nn

from flowdata.probe.fit import fit_head
from tests.test_fit import blobs


def logits(head, features):
    with torch.no_grad():
        return head(features.to(head.weight.dtype)).double()


def plain(features, targets, outputs=3, **options):
    """A head in float64 on columns that are standardised by hand, and its logits."""
    z = features.double()
    z = (z - z.mean(0)) / z.std(0, correction=0)
    head = fit_head(nn.Linear(features.shape[1], outputs).double(), z, targets, **options)
    return logits(head, z)


@pytest.mark.parametrize("strength", [0.05, "held_out"])
def test_columns_of_any_scale_give_the_same_logits(strength):
    x, y = blobs()
    scaled = x.double() * torch.tensor([500.0, 1e-4, 1.0])
    head = fit_head(nn.Linear(3, 3), scaled.float(), y, strength=strength)
    expected = plain(x, y, strength=strength)
    torch.testing.assert_close(logits(head, scaled), expected, atol=1e-3, rtol=0)


def test_a_feature_that_drowned_the_others_does_so_no_more():
    x, y = blobs(samples=300)
    noise = 500 * torch.randn(300, 1, generator=torch.Generator().manual_seed(1))
    features = torch.cat([noise, x * 1e-3], 1)
    head = fit_head(nn.Linear(4, 3), features, y)
    alone = fit_head(nn.Linear(3, 3), x, y)
    accuracy, best = ((o.argmax(1) == y).double().mean() for o in (head(features), alone(x)))
    assert accuracy > best - 0.02


@pytest.mark.parametrize("scale", [1e-30, 1e37])
def test_float32_features_at_the_ends_of_their_range(scale):
    x, y = blobs()
    head = fit_head(nn.Linear(3, 3), x * scale, y, strength=0.05)
    torch.testing.assert_close(
        logits(head, x * scale), plain(x, y, strength=0.05), atol=1e-3, rtol=0
    )


@pytest.mark.parametrize("scale", [1e-200, 1e200])
def test_squares_of_float64_features_neither_over_nor_underflow(scale):
    x, y = blobs()
    head = fit_head(nn.Linear(3, 3).double(), x.double() * scale, y, strength=0.05)
    torch.testing.assert_close(
        logits(head, x.double() * scale), plain(x, y, strength=0.05), atol=1e-5, rtol=0
    )


@pytest.mark.parametrize(
    ("mean", "dtype", "error"), [(1e4, torch.float32, 0.01), (1e8, torch.float64, 1e-5)]
)
def test_the_bias_is_exact_at_large_means(mean, dtype, error):
    x, y = blobs(samples=90, features=16)
    features = (x.double() + mean).to(dtype)
    head = fit_head(nn.Linear(16, 3, dtype=dtype), features, y, strength=0.05)
    expected = plain(features, y, strength=0.05)
    torch.testing.assert_close(logits(head, features), expected, atol=error, rtol=0)


def test_the_bias_takes_up_the_rounding_of_the_weights():
    x, y = blobs(samples=90, features=64)
    features = x.double() + 1e6
    head = fit_head(nn.Linear(64, 3), features, y, strength=0.05)
    means = logits(head.double(), features).mean(0)  # what rounded weights do in exact arithmetic
    expected = plain(features, y, strength=0.05).mean(0)
    steps = torch.finfo(torch.float32).eps * head.bias.abs()
    assert ((means - expected).abs() <= steps + 1e-6).all()


def test_columns_that_do_not_vary_get_no_weight_and_those_of_rounding_neither(caplog):
    x, y = blobs()
    constants = torch.tensor([0.0, 0.1, 1e6]).expand(60, 3)
    noise = 1 + 1e-7 * torch.randn(60, 1, generator=torch.Generator().manual_seed(0))
    head = fit_head(nn.Linear(7, 3), torch.cat([x, constants, noise], 1), y, strength=0.05)
    assert torch.equal(head.weight[:, 3:], torch.zeros(3, 4))
    (record,) = caplog.records
    assert "features[:, 6] varies by no more than the head's dtype" in record.getMessage()
    torch.testing.assert_close(
        logits(head, torch.cat([x, constants, noise], 1)),
        plain(x, y, strength=0.05),
        atol=1e-4,
        rtol=0,
    )


def test_two_samples_that_differ_from_a_constant_are_used_and_one_is_not():
    x, y = blobs()
    spikes = torch.zeros(60, 2)
    spikes[:1, 0] = spikes[:4:3, 1] = 1e-3
    head = fit_head(nn.Linear(5, 3), torch.cat([x, spikes], 1), y, strength=0.05)
    assert head.weight[:, 3].abs().max() < 1e-3 * head.weight[:, :3].abs().max()
    assert head.weight[:, 4].abs().max() > head.weight[:, :3].abs().max()


def test_no_column_varies_says_so_and_the_head_gives_the_shares_of_the_classes(caplog):
    y = torch.tensor([0, 0, 0, 1])
    head = fit_head(nn.Linear(2, 2), torch.full((4, 2), 3.0), y)
    assert torch.equal(head.weight, torch.zeros(2, 2))
    shares = head(torch.full((1, 2), 3.0)).softmax(1)
    torch.testing.assert_close(shares, torch.tensor([[0.75, 0.25]]), atol=1e-5, rtol=0)
    assert [r.getMessage()[:17] for r in caplog.records] == ["no feature varies"]


def test_a_constant_column_is_the_bias_of_a_head_without_one():
    x, y = blobs()
    ones = torch.ones(60, 1)
    head = fit_head(nn.Linear(4, 3, bias=False), torch.cat([x - x.mean(0), ones], 1), y)
    assert head.weight[:, 3].abs().max() > 0.01


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_features_and_heads_in_half_precision(dtype):
    x, y = blobs()
    head = fit_head(nn.Linear(3, 3), x.to(dtype), y, strength=0.05)
    expected = plain(x.to(dtype), y, strength=0.05)
    torch.testing.assert_close(logits(head, x.to(dtype)), expected, atol=1e-4, rtol=0)
    small = fit_head(nn.Linear(3, 3, dtype=dtype), x.to(dtype), y, strength=0.05)
    torch.testing.assert_close(small.weight.float(), head.weight, rtol=0.01, atol=1e-4)


def test_a_dtype_that_cannot_hold_the_head_is_refused_and_one_that_rounds_it_is_said(caplog):
    x, y = blobs()
    head = nn.Linear(3, 3).half()
    before = head.weight.clone()
    with pytest.raises(ValueError, match=r"float16 can't hold .* features\[:, \d\] has .*e-07"):
        fit_head(head, x * 1e-7, y, strength=0.05)
    assert torch.equal(head.weight, before)
    fit_head(nn.Linear(3, 3).bfloat16(), x + 1000, y, strength=0.05)
    (record,) = caplog.records
    assert "bfloat16 rounds its outputs by" in record.getMessage()


def test_regression_outputs_of_any_scale_and_mean_are_solved_alike():
    x, _ = blobs()
    y = torch.stack([x[:, 0] + 0.1 * x[:, 1] ** 2, x[:, 2]], 1).double()
    scale, shift = torch.tensor([1e6, 1e-6]), torch.tensor([1e9, 0.0])
    head = fit_head(nn.Linear(3, 2).double(), x, y, strength=0.05)
    other = fit_head(nn.Linear(3, 2).double(), x, y * scale + shift, strength=0.05)
    back = (logits(other, x) - shift) / scale
    torch.testing.assert_close(back, logits(head, x), atol=1e-5, rtol=0)


def test_more_features_than_samples_match_scikit_learn():
    linear_model = pytest.importorskip("sklearn.linear_model")
    x, y = blobs(samples=30, features=200)
    z = (x - x.mean(0)) / x.std(0, correction=0)
    model = linear_model.LogisticRegression(C=1 / (30 * 0.5), tol=1e-10, max_iter=5000)
    model.fit(z.double().numpy(), y.numpy())
    head = fit_head(nn.Linear(200, 3).double(), x, y, strength=0.5)
    ours = torch.log_softmax(logits(head, x), 1)
    np.testing.assert_allclose(ours, model.predict_log_proba(z.double().numpy()), atol=2e-5)
