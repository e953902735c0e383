"""The closed forms that FLOW's theory rests on, against samples and against gradient descent."""

import numpy as np
import pytest
import torch

from benchmarks import forgetting
from benchmarks.forgetting import theory, theory_picture
from flowdata import flow_weights
from tests import reference, result_pages

APART = torch.tensor([1.0, 0.5, -0.3], dtype=torch.float64)
ACROSS = torch.tensor([0.5, -1.0, 0.0], dtype=torch.float64)
EYE = torch.eye(3, dtype=torch.float64)
SKEWED = torch.tensor([[2.0, 0.3, 0.0], [0.3, 0.5, -0.2], [0.0, -0.2, 1.0]], dtype=torch.float64)
ALONG_E = torch.outer(APART, APART) / APART.square().sum()
ACROSS_E = torch.outer(ACROSS, ACROSS) / ACROSS.square().sum()
MIXED = torch.outer(APART, ACROSS) / APART.norm() / ACROSS.norm()
RHO = 0.5
CORRELATED = EYE + RHO * (MIXED + MIXED.T)  # the Σ̃ of Theorem 7.2


def normal(covariance, samples, seed=0):
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(samples, len(covariance), generator=generator, dtype=torch.float64)
    return x @ torch.linalg.cholesky(covariance).T


@pytest.mark.parametrize("covariance", [EYE, SKEWED, CORRELATED])
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


@pytest.mark.parametrize("covariance", [EYE, SKEWED, CORRELATED])
def test_gradient_descent_on_flows_objective_follows_the_prediction(covariance):
    x, temperature, rate, steps = normal(covariance, 200_000, seed=1), 0.8, 0.05, 40
    weights = flow_weights((x @ APART).square(), temperature=temperature)
    gone = theory.descent_path(x, APART, weights, rate, steps)
    matrix = theory.weighted_covariance(covariance, APART, temperature)
    wanted = theory.descent_position(matrix, APART, rate, torch.arange(steps + 1))
    torch.testing.assert_close(gone, wanted, atol=0.01, rtol=0)
    assert (wanted[-1] - APART).norm() > 0.1  # it went somewhere
    plain = theory.descent_position(covariance, APART, rate, steps)
    assert (gone[-1] - plain).norm() > 0.2  # and not where plain descent goes


def test_the_path_stalls_along_e_as_the_temperature_falls():
    rate, steps = 0.05, 60
    left = []
    for temperature in (100.0, 10.0, 1.0, 0.1, 0.01):
        matrix = theory.weighted_covariance(EYE, APART, temperature)
        mu = (temperature / (temperature + 2 * APART @ APART)) ** 0.5
        end = theory.descent_position(matrix, APART, rate, steps)
        torch.testing.assert_close(end, (1 - 2 * rate * mu**3) ** steps * APART)
        left.append((end @ APART / APART.square().sum()).item())
    assert left == sorted(left)
    assert left[0] < 0.01
    assert left[-1] > 0.99


def test_a_start_across_e_moves_on_while_one_along_e_stalls():
    matrix = theory.weighted_covariance(EYE, APART, 0.1)
    across = torch.linalg.cross(APART, torch.tensor([0.0, 0.0, 1.0], dtype=torch.float64))
    along = theory.descent_position(matrix, APART, 0.1, 50).norm() / APART.norm()
    other = theory.descent_position(matrix, across, 0.1, 50).norm() / across.norm()
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
        "standard": lambda t: theory.descent_position(covariance, APART, 0.01, round(800 * t)),
        "FLOW": lambda t: theory.descent_position(
            theory.weighted_covariance(covariance, APART, 10 ** (8 * t - 4)), APART, 0.05, 80
        ),
    }
    return {
        name: [tuple(map(float, theory.risks(dial(t), APART, covariance, EYE))) for t in grid]
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
    for new, order in (
        (0.1, ["l2", "FLOW", "standard", "averaging"]),
        (0.3, ["l2", "standard", "FLOW", "averaging"]),  # stopped early it is ahead of FLOW here
    ):
        assert sorted(found, key=lambda name: old_risk_at(new, found[name])) == order


def test_l2_and_averaging_are_what_minimising_and_mixing_give():
    strength, alpha = 0.3, 0.4
    theta = theory.l2_minimum(SKEWED, APART, strength).clone().requires_grad_()
    objective = theta @ SKEWED @ theta + strength * (theta - APART).square().sum()
    (gradient,) = torch.autograd.grad(objective, theta)
    torch.testing.assert_close(gradient, torch.zeros_like(gradient), atol=1e-12, rtol=0)
    torch.testing.assert_close(theory.average(APART, alpha), 0.6 * APART)


@pytest.mark.parametrize("rho", [0.3, 0.8])
@pytest.mark.parametrize("temperature", [0.2, 1.0, 9.0])
def test_in_the_papers_setting_the_weighted_covariance_is_that_of_theorem_7_2(rho, temperature):
    mu2 = temperature / (temperature + 2 * APART @ APART)
    q = (1 - mu2) * (ALONG_E + rho**2 * ACROSS_E) - rho * mu2 * (MIXED + MIXED.T)
    covariance = theory.correlated_covariance(APART, ACROSS, rho)
    found = theory.weighted_covariance(covariance, APART, temperature)
    torch.testing.assert_close(found, mu2**0.5 * (EYE - q))


def matrix_and_mu(beta):
    temperature = theory.flow_temperature(APART, RHO, beta)
    mu = (temperature / (temperature + 2 * (APART @ APART).item())) ** 0.5
    return theory.weighted_covariance(CORRELATED, APART, temperature), mu


@pytest.mark.parametrize("beta", [0.01, 0.4, 1.0, 1.7])
def test_equation_14_is_where_the_steps_of_theorem_7_2_lead(beta):
    matrix, mu = matrix_and_mu(beta)
    position = APART
    for steps in range(1, 8):
        position = position - matrix @ position / mu  # the paper's rate, 1/(2μ)
        found = theory.flow_position(APART, ACROSS, RHO, beta, steps)
        torch.testing.assert_close(found, position)
        assert (found @ ACROSS).abs() > 1e-5  # so it is no average of the two models


def test_gradient_descent_on_samples_ends_where_equation_14_says():
    beta, steps, ends = 0.4, 3, []
    temperature, (_, mu) = theory.flow_temperature(APART, RHO, beta), matrix_and_mu(beta)
    for seed in range(20):
        x = normal(CORRELATED, 20_000, seed)
        weights = flow_weights((x @ APART).square(), temperature=temperature)
        ends.append(theory.descent_path(x, APART, weights, 0.5 / mu, steps)[-1])
    ends = torch.stack(ends)
    error = ends.std(dim=0) / len(ends) ** 0.5
    found = theory.flow_position(APART, ACROSS, RHO, beta, steps)
    assert ((ends.mean(dim=0) - found).abs() < 4.5 * error).all()
    assert (error < 0.01).all()  # narrow enough to tell
    assert (found @ ACROSS / ACROSS.norm()).abs() > 0.05


@pytest.mark.parametrize("steps", [1, 2, 5])
def test_at_an_infinite_temperature_equation_14_is_standard_descent(steps):
    beta = 1 / RHO - 1e-10
    assert theory.flow_temperature(APART, RHO, beta) > 1e8
    found = theory.flow_position(APART, ACROSS, RHO, beta, steps)
    standard = theory.descent_position(CORRELATED, APART, 0.5, steps)
    torch.testing.assert_close(found, standard, atol=1e-8, rtol=0)
    # Equation 12: at this rate it is along e or along ē⊥, by turns.
    turn = -ACROSS / ACROSS.norm() * APART.norm() if steps % 2 else APART
    torch.testing.assert_close(standard, RHO**steps * turn)


@pytest.mark.parametrize("covariance", [EYE, SKEWED, CORRELATED])
def test_the_first_step_of_flow_is_a_shorter_one_of_standard_descent(covariance):
    temperature, mean_loss = 0.6, APART @ covariance @ APART
    mu = (temperature / (temperature + 2 * mean_loss)) ** 0.5
    matrix = theory.weighted_covariance(covariance, APART, temperature)
    torch.testing.assert_close(matrix @ APART, mu**3 * covariance @ APART)


def test_one_step_of_equation_14_is_one_of_standard_descent():
    _, mu = matrix_and_mu(0.3)
    torch.testing.assert_close(
        theory.flow_position(APART, ACROSS, RHO, 0.3, 1),
        theory.descent_position(CORRELATED, APART, mu**2 / 2, 1),
    )


def total(off, covariance, old):
    return sum(theory.risks(off, APART, covariance, old))


@pytest.mark.parametrize("scale", [0.05, 1.0, 20.0])
def test_the_best_average_is_better_than_either_end_whatever_the_old_data(scale):
    old = scale * SKEWED  # at 0.05 below I, which the paper rules out
    errors = total(
        theory.average(APART, torch.linspace(0, 1, 2001, dtype=torch.float64)), CORRELATED, old
    )
    least = theory.least_average_error(APART, CORRELATED, old)
    assert errors.min().item() == pytest.approx(least, rel=1e-4)
    assert least <= errors.min()
    assert least < min(errors[0], errors[-1])


def test_flow_reaches_the_best_average_in_the_limit_alone_where_averaging_is_best():
    old = 2 * CORRELATED
    averaging = theory.least_average_error(APART, CORRELATED, old)
    assert theory.least_errors(APART, ACROSS, RHO, old)[theory.BOUND] == pytest.approx(
        averaging / APART.square().sum().item()
    )
    beta = torch.logspace(-4, np.log10(1.99), 2000, dtype=torch.float64)
    gaps = [
        total(theory.flow_position(APART, ACROSS, RHO, beta, steps), CORRELATED, old).min().item()
        / averaging
        - 1
        for steps in (1, 3, 10, 30)
    ]
    assert gaps == sorted(gaps, reverse=True)
    assert gaps[0] > 0.05
    assert 0 < gaps[-1] < 5e-4


def test_without_correlation_standard_descent_and_flow_lie_on_one_curve_with_the_rest():
    after = (APART @ SKEWED @ APART).item() ** 0.5
    trade_offs = theory.trade_offs(APART, ACROSS, 0.0, SKEWED)
    assert {theory.STANDARD, theory.FLOW} < set(trade_offs)
    for name in set(trade_offs) - {theory.BOUND}:
        new, old = trade_offs[name].clamp(min=0).sqrt().T
        place = new / APART.norm() + old / after
        torch.testing.assert_close(place, torch.ones_like(place), atol=1e-6, rtol=0)
        assert new.min() < 0.1  # and on all of it
        assert old.min() < 0.1


def test_which_method_is_ahead_depends_on_the_old_data():
    across = theory.least_errors(APART, ACROSS, RHO, EYE + 2 * ACROSS_E)
    order = [theory.BOUND, theory.FLOW, theory.AVERAGING, theory.L2, theory.STANDARD]
    assert sorted(across, key=across.get) == order
    assert across[theory.FLOW] < across[theory.AVERAGING] - 0.01
    along = theory.least_errors(APART, ACROSS, RHO, EYE + 2 * ALONG_E)
    assert along[theory.FLOW] == pytest.approx(along[theory.STANDARD], abs=1e-5)
    assert along[theory.STANDARD] < along[theory.L2] - 0.005 < along[theory.AVERAGING] - 0.05
    between = theory.least_errors(APART, ACROSS, RHO, EYE + 0.5 * ALONG_E)
    assert between[theory.BOUND] <= between[theory.STANDARD] < between[theory.FLOW] - 5e-4


def test_least_errors_are_those_of_slow_loops():
    old, before = EYE + 2 * ACROSS_E, APART.square().sum()
    loops = {theory.STANDARD: [], theory.FLOW: []}
    for beta in np.geomspace(0.02, 1.9, 60):
        matrix, mu = matrix_and_mu(beta)
        for name, step in {
            theory.STANDARD: 0.16 * beta * CORRELATED,
            theory.FLOW: matrix / mu,
        }.items():
            position = APART
            for _ in range(12):
                position = position - step @ position
                loops[name].append((total(position, CORRELATED, old) / before).item())
    found = theory.least_errors(APART, ACROSS, RHO, old)
    for name, errors in loops.items():
        assert found[name] <= min(errors) + 1e-9
        assert found[name] == pytest.approx(min(errors), abs=5e-3)


@pytest.mark.parametrize("noise", [0.2, 2.0])
def test_with_noise_in_the_labels_flow_ends_between_the_two_models(noise):
    temperature, ends = 0.8, []
    for seed in range(20):
        x = normal(CORRELATED, 20_000, seed)
        generator = torch.Generator().manual_seed(1000 + seed)
        labels = noise**0.5 * torch.randn(len(x), generator=generator, dtype=x.dtype)  # θ̃* is 0
        weighted = torch.exp(-((x @ APART - labels) ** 2) / temperature)[:, None] * x
        ends.append(torch.linalg.solve(weighted.T @ x, weighted.T @ labels))
    ends = torch.stack(ends)
    error = ends.std(dim=0) / len(ends) ** 0.5
    found = theory.noisy_minimum(CORRELATED, APART, temperature, noise)
    assert ((ends.mean(dim=0) - found).abs() < 4.5 * error).all()
    assert (error < 0.02).all()
    assert 0.1 < found.norm() / APART.norm() < 1
    assert not theory.noisy_minimum(CORRELATED, APART, temperature, 0.0).any()


def test_the_readme_gives_these_figures():
    e, across = theory_picture.APART, theory_picture.ACROSS
    new = theory.correlated_covariance(e, across, RHO)
    off, along, alike = (
        theory.least_errors(e, across, RHO, old)
        for old in (theory_picture.OLD_ACROSS, theory_picture.OLD_ALONG, 2 * new)
    )
    beta = torch.logspace(-3, 0, 1000, dtype=torch.float64)
    one, three, ten = (
        sum(theory.risks(theory.flow_position(e, across, RHO, beta, steps), e, new, 2 * new)).min()
        for steps in (1, 3, 10)
    )
    low, high = (  # at the median of the losses, whose mean is 1 + noise
        theory.noisy_minimum(new, e, theory.MEDIAN * (1 + noise), noise)[0] for noise in (0.1, 1)
    )
    methods = (theory.FLOW, theory.AVERAGING, theory.L2, theory.STANDARD)
    for text in (
        "FLOW has {:.1%}, averaging {:.1%}, ℓ2 {:.1%}, standard stopped early {:.1%}".format(
            *(off[name] for name in methods)
        ),
        f"standard stopped early both have {along[theory.STANDARD]:.1%}, ℓ2 {along[theory.L2]:.1%}"
        f", averaging {along[theory.AVERAGING]:.1%}",
        f"at {alike[theory.AVERAGING]:.1%}, one step of FLOW has {one:.1%}, three {three:.1%}, "
        f"ten {ten:.1%}",
        f"stays {low:.0%} of the way behind",
        f"as much noise as error {high:.0%}",
    ):
        assert text.replace("%", " %") in result_pages.text(result_pages.BENCHMARKS / "README.md")


def test_the_picture_is_drawn(tmp_path, capsys):
    path = tmp_path / "new" / "forgetting_theory.png"
    forgetting.main(["theory", "--results", str(path.parent)])
    assert path.read_bytes()[:4] == b"\x89PNG"
    assert str(path) in capsys.readouterr().out
