"""Two ways down a smooth convex function, to where its gradient nearly vanishes."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

_MOST_STEPS = 200
_SUFFICIENT = 1e-4  # share of the decrease that a slope promises (Armijo)
_SHORTEST = 2.0**-40  # step that is tried
_RIDGE = 1e-9  # of the largest second derivative: along some directions there is none


def minimize_by_newton(
    objective: Callable[[Tensor], float],
    curvature: Callable[[Tensor], Tensor],
    parameters: Tensor,
    gradient: Tensor,
    flat_enough: float,
) -> None:
    """Change parameters in place to where an objective is least, by Newton's method.

    Steps are halved until the objective falls by enough of what the slope promises. Where rounding
    leaves nothing to gain, the descent ends.

    Args:
        objective: parameters → value; writes the gradient into `gradient`.
        curvature: parameters → second derivatives, of the parameters' shape twice.
        parameters: float64, where to begin.
        gradient: of the parameters' shape.
        flat_enough: the largest entry of the gradient that ends the descent.
    """
    value = objective(parameters)
    for step in range(_MOST_STEPS):
        # One step is taken from wherever it begins: a start that is flat enough is no solution.
        if step and gradient.abs().max() <= flat_enough:
            return
        slope = gradient.flatten()
        second = curvature(parameters).reshape(len(slope), -1)
        if not second.isfinite().all():
            return
        direction = -_solve(second, slope)
        promised = float(slope @ direction)
        share = 1.0
        while True:
            trial = parameters + share * direction.view_as(parameters)
            new_value = objective(trial)
            if new_value <= value + _SUFFICIENT * share * promised:
                break
            share /= 2
            if share < _SHORTEST:
                return
        parameters.copy_(trial)
        value = new_value


def _solve(curvature: Tensor, slope: Tensor) -> Tensor:
    """The step that second derivatives, (P, P), make of a gradient, (P,)."""
    ridge = _RIDGE * curvature.diagonal().max().clamp_min(torch.finfo(curvature.dtype).tiny)
    while True:
        curvature.diagonal().add_(ridge)
        factor, failed = torch.linalg.cholesky_ex(curvature)
        if not failed:
            return torch.cholesky_solve(slope[:, None], factor)[:, 0]
        ridge *= 100


def minimize_by_lbfgs(
    objective: Callable[[Tensor], float],
    parameters: Tensor,
    gradient: Tensor,
    flat_enough: float,
) -> None:
    """Change parameters in place to where an objective is least, by L-BFGS.

    Args:
        objective: see `minimize_by_newton`.
        parameters: see `minimize_by_newton`.
        gradient: see `minimize_by_newton`.
        flat_enough: see `minimize_by_newton`.
    """
    parameters.grad = gradient
    optimizer = torch.optim.LBFGS(
        [parameters],
        max_iter=5000,
        max_eval=10000,
        history_size=20,
        tolerance_grad=flat_enough,
        tolerance_change=0,
        line_search_fn="strong_wolfe",
    )
    optimizer.step(lambda: objective(parameters))
