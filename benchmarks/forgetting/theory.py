"""The theory of FLOW in the linear setting, in closed forms and drawn.

    python -m benchmarks forgetting theory

A model θ* meets data y = ⟨θ̃*, x⟩, x ~ N(0, Σ); e = θ* − θ̃*. Each sample's loss under θ* is
⟨e, x⟩², so it weighs exp(−⟨e, x⟩² / temperature), and the FLOW objective has the gradient
2 M (θ − θ̃*) with M = E[exp(−⟨e, x⟩² / temperature) x xᵀ]. The weight is a Gaussian in x itself, so
M is a Gaussian integral. Completing the square, and then Sherman–Morrison, gives

    M = μ (Σ − (1 − μ²) Σe eᵀΣ / (eᵀΣe)),   μ = (temperature / (temperature + 2 eᵀΣe))^½

and gradient descent goes through θ_K = θ̃* + (I − 2ηM)^K e. For Σ = I, e is an eigenvector of M
with the eigenvalue μ³, and every direction orthogonal to e has the eigenvalue μ. As μ < 1, FLOW is
slowest along e.

The picture shows how methods trade old risk for new. For Σ = I every method moves θ along e alone,
so all of them lie on one curve, and FLOW's temperature is one more dial on it. Where Σ is no
multiple of I the curves part. ℓ2 is then the best possible if the old data are N(0, I), since its
penalty is the old risk itself. FLOW lies close to ℓ2, and averaging is behind both.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata import flow_weights
from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png


def weighted_covariance(covariance: Tensor, apart: Tensor, temperature: float) -> Tensor:
    """Return M = E[exp(−⟨e, x⟩² / temperature) x xᵀ], (D, D), of x ~ N(0, Σ) and e = `apart`."""
    along = covariance @ apart
    spread = apart @ along
    mu = (temperature / (temperature + 2 * spread)) ** 0.5
    return mu * (covariance - (1 - mu**2) * torch.outer(along, along) / spread)


def predicted_path(matrix: Tensor, apart: Tensor, rate: float, steps: int) -> Tensor:
    """Return θ_K − θ̃* = (I − 2ηM)^K e after K = 0, …, `steps`: (steps + 1, D)."""
    step = torch.eye(len(apart)).to(matrix) - 2 * rate * matrix
    path = [apart]
    for _ in range(steps):
        path.append(step @ path[-1])
    return torch.stack(path)


def descent_path(x: Tensor, apart: Tensor, weights: Tensor, rate: float, steps: int) -> Tensor:
    """Return the same path, taken by autograd's gradients of mean(weight · ⟨θ − θ̃*, x⟩²)."""
    theta = apart.clone().requires_grad_()  # θ̃* is 0: only differences matter
    path = [apart]
    for _ in range(steps):
        loss = (weights * (x @ theta).square()).mean()
        (gradient,) = torch.autograd.grad(loss, theta)
        theta = (theta - rate * gradient).detach().requires_grad_()
        path.append(theta.detach())
    return torch.stack(path)


def l2_minimum(covariance: Tensor, apart: Tensor, strength: float) -> Tensor:
    """Return θ − θ̃* at the minimum of E⟨θ − θ̃*, x⟩² + strength · ‖θ − θ*‖²."""
    eye = torch.eye(len(apart)).to(covariance)
    return strength * torch.linalg.solve(covariance + strength * eye, apart)


def average(apart: Tensor, alpha: float) -> Tensor:
    """Return θ − θ̃* of WiSE-FT: `alpha` of θ̃* and 1 − `alpha` of θ*."""
    return (1 - alpha) * apart


def risks(off: Tensor, apart: Tensor, covariance: Tensor, old: Tensor) -> tuple[float, float]:
    """Return the excess risks of θ, given as θ − θ̃*, on the new data and on the old data."""
    back = off - apart
    return (off @ covariance @ off).item(), (back @ old @ back).item()


def draw(output: Path, samples: int = 200_000) -> Path:
    """Draw the picture into a PNG and return its path.

    Args:
        output: the PNG's path; missing folders are made.
        samples: number of samples that gradient descent runs on.
    """
    apart = torch.tensor([1.0, 0.5, 0.0], dtype=torch.float64)
    old = torch.eye(3, dtype=torch.float64)
    skewed_covariance = torch.diag(torch.tensor([0.2, 2.0, 1.0], dtype=torch.float64))
    with figure(15, 4.6, panels=3) as (drawing, (left, middle, right)):
        _draw_stalling(left, apart, samples)
        _draw_trade_off(middle, apart, old, old)
        middle.set_title("Old against new, Σ = I: one curve for all")
        _draw_trade_off(right, apart, skewed_covariance, old)
        right.set_title("Σ = diag(0.2, 2, 1): the curves part")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(png(drawing))
    return output


def _draw_stalling(axes: Any, apart: Tensor, samples: int) -> None:
    """Draw the distance left along e: predicted as lines, by gradient descent as dots."""
    steps, rate, length = 60, 0.05, apart.norm()
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, len(apart), generator=generator, dtype=apart.dtype)
    for temperature, colour in (
        (float("inf"), "#9aa2b1"),
        (4.0, BLUE),
        (1.0, GREEN),
        (0.2, ORANGE),
    ):
        if temperature == float("inf"):
            matrix, weights, name = torch.eye(len(apart)).to(apart), torch.ones(len(x)), "∞ (plain)"
        else:
            matrix = weighted_covariance(torch.eye(len(apart)).to(apart), apart, temperature)
            weights = flow_weights((x @ apart).square(), temperature=temperature)
            name = f"{temperature:g}"
        line = predicted_path(matrix, apart, rate, steps) @ apart / length**2
        dots = descent_path(x, apart, weights, rate, steps) @ apart / length**2
        axes.plot(line, color=colour, label=f"temperature {name}")
        axes.plot(range(0, steps + 1, 6), dots[::6], "o", color=colour, markersize=4)
    axes.set(title="FLOW stalls along e", xlabel="step", ylabel="share of e left", ylim=(0, 1.02))
    axes.legend(fontsize=8)


def _draw_trade_off(axes: Any, apart: Tensor, covariance: Tensor, old: Tensor) -> None:
    """Draw the excess risk on the old data over that on the new data, along each method's dial."""
    grid = torch.linspace(0, 1, 81, dtype=torch.float64)
    rate, steps = 0.1, 40
    dials: dict[str, tuple[Callable[[float], Tensor], str, Any]] = {
        "plain, over the steps": (
            lambda t: predicted_path(covariance, apart, rate / 10, round(400 * t))[-1],
            "-",
            "#9aa2b1",
        ),
        "ℓ2, over the strength": (
            lambda t: l2_minimum(covariance, apart, 10 ** (6 * t - 3)),
            "--",
            BLUE,
        ),
        "averaging, over α": (lambda t: average(apart, t), ":", ORANGE),
        f"FLOW, {steps} steps, over the temperature": (
            lambda t: predicted_path(
                weighted_covariance(covariance, apart, 10 ** (6 * t - 3)), apart, rate, steps
            )[-1],
            "-.",
            GREEN,
        ),
    }
    for name, (dial, style, colour) in dials.items():
        points = [risks(dial(t), apart, covariance, old) for t in grid.tolist()]
        axes.plot(*zip(*points, strict=True), style, color=colour, label=name, linewidth=1.8)
    axes.set(xlabel="excess risk on the new data", ylabel="excess risk on the old data")
    axes.grid(True, axis="both")
    axes.legend(fontsize=8)
