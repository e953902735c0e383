"""What the targets of a probe mean: classes, labels, probabilities, counts, values."""

import numpy as np
import pytest
import torch
from torch import nn

from flowdata.probe.fit import fit_head
from tests.test_fit import blobs

X, Y = blobs()
ONE_HOT = nn.functional.one_hot(Y, 3)
COUNTS = torch.stack([2 * Y, Y + 1], 1)
SOFT = 0.9 * ONE_HOT + 0.1 / 3
YES = Y > 0


def fitted(targets, outputs, **options):
    head = fit_head(nn.Linear(3, outputs), X, targets, strength=0.05, **options)
    return torch.cat([head.weight, head.bias[:, None]], 1).detach()


SAME = [
    ("classes in a column", Y[:, None], Y, 3, "cross_entropy"),
    ("classes in bytes", Y.to(torch.uint8), Y, 3, "cross_entropy"),
    ("classes in unsigned numbers", Y.to(torch.uint16)[:, None], Y, 3, "cross_entropy"),
    ("bools of two classes", YES, YES.long(), 2, "cross_entropy"),
    ("labels in a column", YES.long()[:, None], YES.float(), 1, "binary_cross_entropy"),
    ("integer labels of one output", YES.long(), YES.float(), 1, "binary_cross_entropy"),
    ("several labels", COUNTS % 2, (COUNTS % 2).float(), 2, "binary_cross_entropy"),
    ("integer values", 3 * Y - 7, (3 * Y - 7).float(), 1, "mse"),
    ("integer values in a column", 3 * Y[:, None], 3.0 * Y, 1, "mse"),
    ("negative integers", -Y, -Y.float(), 1, "mse"),
    ("counts", COUNTS, COUNTS.double(), 2, "mse"),
    ("probabilities", SOFT, SOFT.double(), 3, "cross_entropy"),
    ("probabilities in half precision", SOFT.half(), SOFT.half().double(), 3, "cross_entropy"),
]


@pytest.mark.parametrize(("name", "targets", "plain", "outputs", "loss"), SAME)
def test_targets_are_told_apart(name, targets, plain, outputs, loss):
    assert torch.equal(fitted(targets, outputs), fitted(plain, outputs, loss=loss))


@pytest.mark.parametrize("hot", [ONE_HOT, ONE_HOT.float(), ONE_HOT.bool()])
def test_one_hot_rows_are_classes_where_the_loss_is_named(hot):
    torch.testing.assert_close(fitted(hot, 3, loss="cross_entropy"), fitted(Y, 3))


def test_probabilities_are_fitted_as_scikit_learn_fits_weighted_classes():
    linear_model = pytest.importorskip("sklearn.linear_model")
    z = (X - X.mean(0)) / X.std(0, correction=0)
    model = linear_model.LogisticRegression(C=1 / (60 * 0.05), tol=1e-10, max_iter=5000)
    rows, classes = z.double().repeat(3, 1), torch.arange(3).repeat_interleave(60)
    model.fit(rows.numpy(), classes.numpy(), sample_weight=SOFT.T.reshape(-1).numpy())
    head = fit_head(nn.Linear(3, 3).double(), X, SOFT, strength=0.05)
    ours = torch.log_softmax(head(X.double()), 1).detach()
    np.testing.assert_allclose(ours, model.predict_log_proba(z.double().numpy()), atol=2e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("share", [0.9, 0.7, 1 / 3])
def test_probabilities_rounded_to_half_precision_are_probabilities(dtype, share):
    rows = torch.where(YES[:, None], torch.tensor([share, 1 - share]), torch.tensor([0.2, 0.8]))
    expected = fitted(rows, 2, loss="cross_entropy")
    assert torch.allclose(fitted(rows.to(dtype), 2), expected, rtol=0.05, atol=0.02)


def test_integers_taken_for_values_are_said(capsys, caplog):
    caplog.set_level("INFO")
    fitted(3 * Y, 1)
    (record,) = caplog.records
    assert "takes its integer targets, (60,), for values of a regression" in record.getMessage()


IGNORED = torch.where(Y == 2, -100, Y)
BAD = [
    (ONE_HOT, 3, {}, "a single 1 in each row.*pass loss='cross_entropy' or 'binary"),
    (ONE_HOT.float(), 3, {}, "a single 1 in each row"),
    (Y.float(), 3, {}, r"got \(60,\); classes must be integers: targets\.long\(\)"),
    (Y.float()[:, None], 3, {}, r"got \(60, 1\); classes must be integers"),
    (YES, 3, {}, r"must be integer classes .* got torch\.bool \(60,\) for a head of 3 outputs"),
    (IGNORED, 3, {}, r"targets\[2\].* -100 marks a sample without a target: drop .*\(20 of 60"),
    (IGNORED, 1, {}, r"targets\[2\] -100 marks"),
    (IGNORED[:, None].float(), 1, {}, r"targets\[2\] -100 marks"),
    (IGNORED.clamp(min=-1), 3, {}, r"targets\[2\] is -1: no class of a head with 3 outputs"),
    (Y, 1, {"loss": "cross_entropy"}, "a head of one output has no classes"),
    (SOFT * 2, 3, {"loss": "cross_entropy"}, r"targets\[0\] no probabilities of classes"),
    (Y * 0 + 1, 3, {}, "at least two classes, all 60 are 1"),
    (YES * 0.0 + 1, 1, {}, "at least two classes, all 60 are"),
    (COUNTS.double() / 0, 2, {}, r"targets\[0\] not finite"),
    (COUNTS, 3, {}, r"must have shape \(60, 3\).* got \(60, 2\)"),
    (Y[:, None, None], 3, {}, r"real numbers of shape \(N,\) or \(N, C\), got torch.int64 \(60, 1"),
    (Y[0], 3, {}, "as many as features, 60 > 0; got a single number"),
    (Y + 0j, 3, {}, "must be real numbers"),
]


@pytest.mark.parametrize(("targets", "outputs", "options", "message"), BAD)
def test_what_nothing_can_tell_is_refused_with_the_remedy(targets, outputs, options, message):
    with pytest.raises(ValueError, match=message):
        fitted(targets, outputs, **options)


def test_features_and_targets_may_carry_gradients_or_come_from_inference_mode():
    expected = fitted(Y, 3)
    leaf = X.clone().requires_grad_()
    head = fit_head(nn.Linear(3, 3), leaf * 1, Y, strength=0.05)
    assert leaf.grad is None
    torch.testing.assert_close(head.weight.detach(), expected[:, :3])
    with torch.inference_mode():
        head = fit_head(nn.Linear(3, 3), X * 1, Y * 1, strength=0.05)
        torch.testing.assert_close(head.weight.detach(), expected[:, :3])


class Cosine(nn.Linear):
    def forward(self, x):
        return nn.functional.normalize(x) @ nn.functional.normalize(self.weight).T


@pytest.mark.parametrize(
    ("make", "error", "message"),
    [
        (lambda: nn.Conv1d(3, 3, 1), TypeError, r"must be an nn\.Linear, got Conv1d"),
        (lambda: nn.utils.parametrizations.weight_norm(nn.Linear(3, 3)), TypeError, "parametrised"),
        (lambda: nn.utils.parametrizations.spectral_norm(nn.Linear(3, 3)), TypeError, "plain"),
        (lambda: Cosine(3, 3), TypeError, "got Cosine whose weight is"),
        (lambda: nn.LazyLinear(3), ValueError, "no values yet"),
        (lambda: nn.Linear(3, 3, device="meta"), ValueError, "no values yet"),
    ],
)
def test_heads_that_would_not_hold_the_solution_are_refused(make, error, message):
    with pytest.raises(error, match=message):
        fit_head(make(), X, Y)
