"""The closed forms that FLOW's theory rests on, against samples and against gradient descent."""

import numpy as np
import pytest
import torch

from benchmarks import forgetting
from benchmarks.forgetting import theory
from flowdata import flow_weights
from tests import reference

APART = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
SKEWED = torch.tensor([[2.0, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 1.0]], dtype=torch.float64)


def normal(covariance, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, len(covariance), generator=generator, dtype=torch.float64)
    return x @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("covariance", [EYE, SKEWED])
@pytest.mark.parametrize("temperature", [0.1, 1.0, 10.0])
def test_the_weighted_covariance_is_what_samples_give(covariance, temperature):
    x = normal(covariance, 400_000)
    mean, error = reference.weighted_second_moment(x, APART, temperature)
    found = theory.weighted_covariance(covariance, APART, temperature).numpy()
    assert (np.abs(found - mean) < 4.5 * error).all()
    assert (error < 0.01 * np.abs(found).max()).all()  # narrow enough to tell


def test_for_white_data_the_weighted_covariance_shrinks_the_direction_of_e_alone():
    temperature = 0.7
    mu = (temperature / (temperature + 2 * APART @ APART)) ** 0.5
    unit = APART / APART.norm()
    found = theory.weighted_covariance(EYE, APART, temperature)
    torch.testing.assert_close(found, mu * (EYE - (1 - mu**2) * torch.outer(unit, unit)))
    torch.testing.assert_close(found @ unit, mu**3 * unit)
    across = torch.linalg.cross(unit, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    torch.testing.assert_close(found @ across, mu * across)


@pytest.mark.parametrize("covariance", [EYE, SKEWED])
def test_gradient_descent_on_flows_objective_follows_the_prediction(covariance):
    x, temperature, rate, steps = normal(covariance, 400_000, seed=1), 0.8, 0.05, 40
    weights = flow_weights((x @ APART).square(), temperature=temperature)
    gone = theory.descent_path(x, APART, weights, rate, steps)
    matrix = theory.weighted_covariance(covariance, APART, temperature)
    wanted = theory.predicted_path(matrix, APART, rate, steps)
    torch.testing.assert_close(gone, wanted, atol=0.01, rtol=0)
    assert (wanted[-1] - APART).norm() > 0.1  # it went somewhere
    plain = theory.predicted_path(covariance, APART, rate, steps)
    assert (gone[-1] - plain[-1]).norm() > 0.2  # and not where plain descent goes


def test_the_path_stalls_along_e_as_the_temperature_falls():
    rate, steps = 0.05, 60
    left = []
    for temperature in (100.0, 10.0, 1.0, 0.1, 0.01):
        matrix = theory.weighted_covariance(EYE, APART, temperature)
        mu = (temperature / (temperature + 2 * APART @ APART)) ** 0.5
        end = theory.predicted_path(matrix, APART, rate, steps)[-1]
        torch.testing.assert_close(end, (1 - 2 * rate * mu**3) ** steps * APART)
        left.append((end @ APART / APART.square().sum()).item())
    assert left == sorted(left)
    assert left[0] < 0.01
    assert left[-1] > 0.99


def test_a_start_across_e_moves_on_while_one_along_e_stalls():
    matrix = theory.weighted_covariance(EYE, APART, 0.1)
    across = torch.linalg.cross(APART, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    along = theory.predicted_path(matrix, APART, 0.1, 50)[-1].norm() / APART.norm()
    other = theory.predicted_path(matrix, across, 0.1, 50)[-1].norm() / across.norm()
    assert along > 0.9
    assert other < 0.2


def old_risk_at(new_risk, points):
    """The old risk on a curve of (new, old) points where the new risk is `new_risk`."""
    new, old = map(np.array, zip(*sorted(points), strict=True))
    return np.interp(new_risk, new, old)


def curves(covariance):
    grid = np.linspace(0, 1, 400)
    dials = {
        "l2": lambda t: theory.l2_minimum(covariance, APART, 10 ** (8 * t - 4)),
        "averaging": lambda t: theory.average(APART, t),
        "FLOW": lambda t: theory.predicted_path(
            theory.weighted_covariance(covariance, APART, 10 ** (8 * t - 4)), APART, 0.05, 80
        )[-1],
    }
    return {
        name: [theory.risks(dial(t), APART, covariance, EYE) for t in grid]
        for name, dial in dials.items()
    }


def test_on_white_data_all_methods_trade_old_for_new_along_one_curve():
    length = APART.norm().item()
    for name, points in curves(EYE).items():
        for new, old in points:
            assert new**0.5 + old**0.5 == pytest.approx(length, rel=1e-6), name


def test_on_other_data_l2_is_best_flow_close_and_averaging_last():
    stretched = torch.diag(torch.tensor([0.2, 2.0, 1.0], dtype=torch.float64))
    found = curves(stretched)
    for new in (0.1, 0.2, 0.3):
        l2, flow, mean = (old_risk_at(new, found[name]) for name in ("l2", "FLOW", "averaging"))
        assert l2 <= flow + 1e-3
        assert flow < mean - 0.01
        assert flow - l2 < 0.5 * (mean - l2)


def test_l2_and_averaging_are_what_minimising_and_mixing_give():
    strength, alpha = 0.3, 0.4
    theta = theory.l2_minimum(SKEWED, APART, strength).clone().requires_grad_()
    objective = theta @ SKEWED @ theta + strength * (theta - APART).square().sum()
    (gradient,) = torch.autograd.grad(objective, theta)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    torch.testing.assert_close(theory.average(APART, alpha), 0.6 * APART)


def test_the_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "new" / "forgetting_theory.png"
    forgetting.main(["theory", "--results", str(path.parent)])
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert str(path) in capsys.readouterr().out
