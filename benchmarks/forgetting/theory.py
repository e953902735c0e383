"""The theory of FLOW in the linear setting, in closed forms.

A model θ* meets data y = ⟨θ̃*, x⟩, x ~ N(0, Σ̃); e = θ* − θ̃*. Each sample's loss under θ* is
⟨e, x⟩², so it weighs exp(−⟨e, x⟩² / temperature), and the FLOW objective has the gradient
2 M (θ − θ̃*) with M = E[exp(−⟨e, x⟩² / temperature) x xᵀ]. The weight is a Gaussian in x itself, so
M is a Gaussian integral. Completing the square, and then Sherman–Morrison, gives

    M = μ (Σ̃ − (1 − μ²) Σ̃e eᵀΣ̃ / (eᵀΣ̃e)),   μ = (temperature / (temperature + 2 eᵀΣ̃e))^½

and gradient descent goes through θ_K = θ̃* + (I − 2ηM)^K e. Two things follow for every Σ̃. As
Me = μ³ Σ̃e, the first step is the one of standard descent, only shorter. And what lies along e is
held back by μ³, what is Σ̃-orthogonal to e by μ alone: this is what the paper calls stalling.

The paper ("Upweighting Easy Samples in Fine-Tuning Mitigates Forgetting", arXiv:2502.02797v2,
section 7) treats Σ̃ = I + ρ(ē ē⊥ᵀ + ē⊥ ēᵀ), 0 ≤ ρ < 1, where ē = e/‖e‖ and the unit vector ē⊥ is
orthogonal to it. Its setting, μ, equations 14 and 17 and Remark 7.6 are taken from there. The
derivations are our own, and so is what stands here of the range of β and of steps, of noise, and of
standard descent that is stopped early. What holds:

- Theorem 7.2 is M for that Σ̃, and exact: for Gaussian x, labels without noise, endless data.
- Equation 14 is exact too. The paper has it for β in (0, 1], temperatures up to 2‖e‖². It holds for
  all β below 1/ρ, where the temperature is infinite and FLOW is standard descent.
- Remark 7.6, that FLOW at its best is no worse than averaging at its best, holds as a limit. More
  steps at a lower temperature come as close to averaging as one likes. With a given number of steps
  FLOW can be worse: it is wherever averaging is the best possible (Σ ∝ Σ̃, ρ > 0). For ρ = ½ and
  Σ = 2Σ̃ the least error on both data sets is 66.7 % of that before fine-tuning by averaging, and
  70.2 % by one step of FLOW, 67.5 % by three.
- The remark sets FLOW against standard descent at a rate of ½ that is run to its end. Standard
  descent that is stopped early is the fair rival, and FLOW need not beat it: one step of FLOW at
  the paper's rate is one step of standard descent at the rate μ²/2. FLOW so reaches from standard
  descent (one step) to averaging (endless steps). For ρ = ½ it has 48.4 % against 52.7 % where
  Σ = I + 2ē⊥ē⊥ᵀ, 68.8 % as standard descent where Σ = I + 2ēēᵀ, and 55.4 % against 55.3 % where
  Σ = I + ½ēēᵀ. For ρ = 0 all methods lie on one curve.
- With noise in the labels FLOW no longer leads to θ̃*: see `noisy_minimum`.

Positions are given as θ − θ̃*, since only differences matter.
"""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor

BOUND = "both data sets at once"
AVERAGING = "averaging (WiSE-FT)"
L2 = "ℓ2"
STANDARD = "standard, stopped early"
FLOW = "FLOW"
MEDIAN = 0.4549364  # χ²'s with one degree of freedom: the losses' median, of their mean


def shrinkage(mean_loss: float, temperature: float) -> float:
    """Return μ, of the mean loss under θ*: eᵀΣ̃e, and the noise's variance if labels have noise."""
    return (1 + 2 * mean_loss / temperature) ** -0.5


def weighted_covariance(covariance: Tensor, apart: Tensor, temperature: float) -> Tensor:
    """Return M = E[exp(−⟨e, x⟩² / temperature) x xᵀ], (D, D), of x ~ N(0, Σ̃) and e = `apart`."""
    along = covariance @ apart
    mean_loss = (apart @ along).item()
    mu = shrinkage(mean_loss, temperature)
    return mu * (covariance - (1 - mu**2) * torch.outer(along, along) / mean_loss)


def correlated_covariance(apart: Tensor, across: Tensor, rho: float) -> Tensor:
    """Return the Σ̃ of Theorem 7.2, (D, D); `across`, orthogonal to e = `apart`, gives ē⊥."""
    mixed = torch.outer(apart / apart.norm(), across / across.norm())
    return torch.eye(len(apart)).to(apart) + rho * (mixed + mixed.T)


def flow_temperature(apart: Tensor, rho: float, beta: float) -> float:
    """Return the temperature of μ² = β(1 − ρ²) / ((1 + β)(1 − βρ²)), for `flow_position`."""
    return 2 * beta * (1 - rho**2) * apart.square().sum().item() / (1 - (beta * rho) ** 2)


def flow_position(
    apart: Tensor, across: Tensor, rho: float, beta: float | Tensor, steps: int | Tensor
) -> Tensor:
    """Return where FLOW is after its steps at the paper's rate, 1/(2μ): equation 14.

    I − 2ηM is then Theorem 7.2's Q. Its eigenvectors in the plane of e and ē⊥ are ē − βρ ē⊥ and
    βρ ē + ē⊥, and e is a sum of the two, so each power of Q is two powers of numbers.

    Args:
        apart: e, (D,).
        across: a vector orthogonal to e, (D,), which gives ē⊥.
        rho: the correlation of the new data along ē and ē⊥, in [0, 1).
        beta: above 0 and below 1/ρ; small is a low temperature, see `flow_temperature`.
        steps: number of steps; may be a tensor, which is broadcast with `beta`.

    Returns:
        θ_K − θ̃*, (…, D).
    """
    beta, steps = (torch.as_tensor(dial, dtype=apart.dtype) for dial in (beta, steps))
    slow = ((1 + beta * rho**2) / (1 + beta)) ** steps
    fast = (rho**2 * (1 - beta) / (1 - beta * rho**2)) ** steps
    tilt = beta * rho
    along = (slow + tilt**2 * fast) / (1 + tilt**2)
    aside = -tilt * (slow - fast) / (1 + tilt**2)
    other = across / across.norm() * apart.norm()
    return along.unsqueeze(-1) * apart + aside.unsqueeze(-1) * other


def noisy_minimum(covariance: Tensor, apart: Tensor, temperature: float, noise: float) -> Tensor:
    """Return θ − θ̃* at the minimum of FLOW's objective where labels have noise of this variance.

    The loss under θ* is then (⟨e, x⟩ − noise)², again a Gaussian's, so M of (x, noise) has the
    closed form above, of e joined to −1. Among easy samples noise goes along with ⟨e, x⟩, and the
    minimum lies on the way from θ̃* to θ*. Training longer doesn't lead past it.
    """
    mean_loss = (apart @ covariance @ apart).item()
    mu = shrinkage(mean_loss + noise, temperature)
    return (1 - mu**2) * noise / (noise + mu**2 * mean_loss) * apart


def descent_position(
    matrix: Tensor, apart: Tensor, rate: float | Tensor, steps: int | Tensor
) -> Tensor:
    """Return θ_K − θ̃* = (I − 2ηM)^K e, (…, D); `rate` and `steps` may be tensors."""
    rate, steps = (torch.as_tensor(dial, dtype=apart.dtype).unsqueeze(-1) for dial in (rate, steps))
    return _shrink(matrix, apart, lambda values: (1 - 2 * rate * values) ** steps)


def descent_path(x: Tensor, apart: Tensor, weights: Tensor, rate: float, steps: int) -> Tensor:
    """Return (steps + 1, D), taken by autograd's gradients of mean(weight · ⟨θ − θ̃*, x⟩²)."""
    theta = apart.clone().requires_grad_()  # θ̃* is 0: only differences matter
    path = [apart]
    for _ in range(steps):
        loss = (weights * (x @ theta).square()).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
        path.append(theta.detach())
    return torch.stack(path)


def l2_minimum(covariance: Tensor, apart: Tensor, strength: float | Tensor) -> Tensor:
    """Return θ − θ̃*, (…, D), at the minimum of E⟨θ − θ̃*, x⟩² + strength · ‖θ − θ*‖².

    For old data N(0, I) the penalty is the old risk itself, so that no method does better.
    """
    strength = torch.as_tensor(strength, dtype=apart.dtype).unsqueeze(-1)
    return _shrink(covariance, apart, lambda values: strength / (values + strength))


def average(apart: Tensor, alpha: float | Tensor) -> Tensor:
    """Return θ − θ̃* of WiSE-FT, (…, D): `alpha` of θ̃* and 1 − `alpha` of θ*."""
    return (1 - torch.as_tensor(alpha, dtype=apart.dtype)).unsqueeze(-1) * apart


def joint_minimum(covariance: Tensor, old: Tensor, apart: Tensor, weight: Tensor) -> Tensor:
    """Return θ − θ̃*, (P, D), at the least new risk + weight · old risk: no method does better."""
    weighted = weight[:, None, None] * old
    return torch.linalg.solve(covariance + weighted, weighted @ apart)


def risks(off: Tensor, apart: Tensor, covariance: Tensor, old: Tensor) -> tuple[Tensor, Tensor]:
    """Return the excess risks of θ, given as θ − θ̃*, on the new data and on the old data."""
    back = off - apart
    return ((off @ covariance) * off).sum(-1), ((back @ old) * back).sum(-1)


def least_average_error(apart: Tensor, covariance: Tensor, old: Tensor) -> float:
    """Return the least sum of new and old risk of all averages: equation 17, for any Σ and Σ̃.

    With a = eᵀΣe, the old risk of θ̃*, and b = eᵀΣ̃e, the new risk of θ*, it is ab / (a + b). That
    is below both a and b whatever Σ is: Remark 7.6 needs no Σ ⪰ I for this.
    """
    after, before = apart @ old @ apart, apart @ covariance @ apart
    return (after * before / (after + before)).item()


def trade_offs(apart: Tensor, across: Tensor, rho: float, old: Tensor) -> dict[str, Tensor]:
    """Return the new and the old risk of every method at many settings of all its dials.

    Averaging and ℓ2 have one dial. Standard descent has two, steps and rate, up to the largest that
    overshoots in no direction. FLOW has two, steps and temperature; its rate is the paper's. What
    is best on a dial is seen with the old data alone, which nobody has who fine-tunes: these are
    bounds, not what a user gets.

    Args:
        apart: e, (D,).
        across: a vector orthogonal to e, (D,), which gives ē⊥.
        rho: the correlation of the new data along ē and ē⊥, in [0, 1).
        old: the old data's covariance Σ, (D, D).

    Returns:
        By method, (P, 2): new and old risk.
    """
    covariance = correlated_covariance(apart, across, rho)
    dtype = apart.dtype
    wide = torch.logspace(-4, 4, 801, dtype=dtype)
    steps = torch.tensor([*range(1, 41), 100, 1000])
    rate = torch.logspace(-3, math.log10(0.5 / (1 + rho)), 2000, dtype=dtype)[:, None]
    end = 0.9999 / max(rho, 1e-3)  # just below an infinite temperature
    beta = torch.logspace(-4, math.log10(end), 2000, dtype=dtype)[:, None]
    positions = {
        BOUND: joint_minimum(covariance, old, apart, wide),
        AVERAGING: average(apart, torch.linspace(0, 1, 801, dtype=dtype)),
        L2: l2_minimum(covariance, apart, wide),
        STANDARD: descent_position(covariance, apart, rate, steps),
        FLOW: flow_position(apart, across, rho, beta, steps),
    }
    return {
        name: torch.stack(risks(off, apart, covariance, old), dim=-1).reshape(-1, 2)
        for name, off in positions.items()
    }


def least_errors(apart: Tensor, across: Tensor, rho: float, old: Tensor) -> dict[str, float]:
    """Return by method the least sum of new and old risk, as a share of that before fine-tuning."""
    before = apart.square().sum()
    return {
        name: (points.sum(-1).min() / before).item()
        for name, points in trade_offs(apart, across, rho, old).items()
    }


def _shrink(matrix: Tensor, apart: Tensor, factor: Callable[[Tensor], Tensor]) -> Tensor:
    """e with each of its parts along an eigenvector times the factor of the eigenvalue."""
    values, vectors = torch.linalg.eigh(matrix)
    return (factor(values) * (apart @ vectors)) @ vectors.T
