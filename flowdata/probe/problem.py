"""The convex problem of a linear head on fixed features, and its solvers.

A head of few parameters is solved by Newton's method: where the classes are nearly told apart the
problem is so ill-conditioned that L-BFGS needs a thousand steps, and Newton's method ten. Larger
heads, whose second derivatives would not fit, are solved by L-BFGS.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.probe.descent import minimize_by_lbfgs, minimize_by_newton
from flowdata.probe.scaling import ROWS

HeadLoss: TypeAlias = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]
LossAndSlope: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]
Curvature: TypeAlias = Callable[[Tensor], Tensor]

_CURVATURE = 0.25  # of a loss by a standardised feature's weight, about
_LEAST_SLOPE = 1e-5  # a start this flat is a solution: what is left of its gradient is rounding
_MOST_FOR_NEWTON = 1024  # parameters: second derivatives of 8 MiB
_MOST_OUTPUTS_FOR_NEWTON = 64


def _cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    log_probabilities = logits.log_softmax(1)
    slope = log_probabilities.exp()
    if targets.is_floating_point():
        return -(targets * log_probabilities).sum(), slope.sub_(targets)
    places = targets[:, None]
    slope.scatter_add_(1, places, slope.new_full(places.shape, -1.0))
    return -log_probabilities.gather(1, places).sum(), slope


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs = logits.shape[1]
    loss = F.binary_cross_entropy_with_logits(logits, targets, reduction="sum")
    return loss / outputs, (logits.sigmoid() - targets).div_(outputs)


def _mse(logits: Tensor, targets: Tensor) -> tuple[Tensor, Tensor]:
    outputs = logits.shape[1]
    errors = logits - targets
    return errors.square().sum() / outputs, errors.mul_(2 / outputs)


# Sums over the samples of a slice, each sample's loss being the mean over its outputs, and their
# derivatives by the logits.
LOSSES: dict[str, LossAndSlope] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mse,
}


def _cross_entropy_curvature(logits: Tensor) -> Tensor:
    shares = logits.softmax(1)
    return shares.diag_embed() - shares[:, :, None] * shares[:, None]


def _binary_cross_entropy_curvature(logits: Tensor) -> Tensor:
    shares = logits.sigmoid()
    return (shares * (1 - shares) / logits.shape[1]).diag_embed()


def _mse_curvature(logits: Tensor) -> Tensor:
    return torch.full_like(logits, 2 / logits.shape[1]).diag_embed()


# Second derivatives of each sample's loss by its logits, (N, C) → (N, C, C).
CURVATURES: dict[LossAndSlope, Curvature] = {
    _cross_entropy: _cross_entropy_curvature,
    _binary_cross_entropy: _binary_cross_entropy_curvature,
    _mse: _mse_curvature,
}


class HeadProblem:
    """Mean loss + strength / 2 · ‖W‖² over a head's parameters, (C, D + 1) float64.

    The last column of the parameters is the bias. The penalty leaves it alone, and it stays 0 for
    a head without one:

        parameters = | W (C, D) | b (C, 1) |

    Args:
        features: (N, D) floating, scaled.
        targets: (N,) or (N, C), as the loss takes them.
        loss: one of `LOSSES`.
        outputs: C.
        bias: whether the head has a bias.
    """

    def __init__(
        self, features: Tensor, targets: Tensor, loss: LossAndSlope, outputs: int, bias: bool
    ) -> None:
        self.features, self.targets, self.loss = features, targets, loss
        self.outputs, self.bias = outputs, bias

    def start(self) -> Tensor:
        """Return parameters of 0."""
        return self.features.new_zeros(
            self.outputs, self.features.shape[1] + 1, dtype=torch.float64
        )

    def rows(self, indices: Tensor) -> HeadProblem:
        """Return the same problem on some of the samples."""
        features, targets = self.features[indices], self.targets[indices]
        return HeadProblem(features, targets, self.loss, self.outputs, self.bias)

    def mean_loss(self, parameters: Tensor, gradient: Tensor | None = None) -> float:
        """Return the mean loss, and add its gradient to `gradient`."""
        total = 0.0
        samples = len(self.features)
        for part, targets in zip(self.features.split(ROWS), self.targets.split(ROWS), strict=True):
            rows = part.double()
            loss, slope = self.loss(
                torch.addmm(parameters[:, -1], rows, parameters[:, :-1].T), targets
            )
            total += loss.item() / samples
            if gradient is not None:
                gradient[:, :-1].addmm_(slope.T, rows, alpha=1 / samples)
                if self.bias:
                    gradient[:, -1].add_(slope.sum(0), alpha=1 / samples)
        return total

    def objective(self, parameters: Tensor, strength: float, gradient: Tensor) -> float:
        """Return the mean loss with its penalty, and write the gradient into `gradient`."""
        weight = parameters[:, :-1]
        value = self.mean_loss(parameters, gradient.zero_())
        gradient[:, :-1].add_(weight, alpha=strength)
        return value + strength / 2 * weight.square().sum().item()

    def solve(self, start: Tensor, strength: float, tolerance: float) -> Tensor:
        """Return the parameters of least objective; a warning says where they were not reached.

        Args:
            start: where the solver begins.
            strength: of the penalty.
            tolerance: the largest entry of the gradient at the solution, as a share of the one at
                parameters of 0.
        """
        # W / stretch is as curved as the bias, which the penalty leaves alone: L-BFGS needs several
        # times fewer steps under strong penalties.
        stretch = start.new_ones(start.shape[1])
        stretch[:-1] = (1 + strength / _CURVATURE) ** -0.5
        parameters, gradient = start / stretch, torch.zeros_like(start)

        def objective(parameters: Tensor) -> float:
            value = self.objective(parameters * stretch, strength, gradient)
            gradient.mul_(stretch)
            return value

        objective(self.start())
        flat_enough = tolerance * max(gradient.abs().max().item(), _LEAST_SLOPE)
        is_small = start.numel() <= _MOST_FOR_NEWTON and len(start) <= _MOST_OUTPUTS_FOR_NEWTON
        if is_small:
            curvature = partial(self._curvature, strength, stretch)
            minimize_by_newton(objective, curvature, parameters, gradient, flat_enough)
        else:
            minimize_by_lbfgs(objective, parameters, gradient, flat_enough)
        # The line search leaves the gradient of the last point tried, not that of the best one.
        objective(parameters)
        # Rounding may end the descent a little short of the tolerance; that does no harm.
        if not (steepest := gradient.abs().max().item()) <= 100 * flat_enough:  # NaN neither
            logger.warning(
                "the probe did not converge at strength=%g: gradient %.1e, wanted %.1e; "
                "a larger strength is easier to solve",
                strength,
                steepest,
                flat_enough,
            )
        return parameters * stretch

    def _curvature(self, strength: float, stretch: Tensor, parameters: Tensor) -> Tensor:
        """The objective's second derivatives by W / stretch and the bias, (C, D + 1, C, D + 1)."""
        outputs, width = parameters.shape
        weight = parameters * stretch
        total = weight.new_zeros(outputs, width, outputs, width)
        for part in self.features.split(ROWS):
            rows = F.pad(part.double(), (0, 1), value=float(self.bias))
            curvature = CURVATURES[self.loss](rows @ weight.T) / len(self.features)
            rows = rows * stretch
            for a in range(outputs):
                of_earlier = curvature[:, a, : a + 1, None] * rows[:, None]
                products = of_earlier.flatten(1).T @ rows  # of each earlier output's rows with a's
                total[a, :, : a + 1] += products.view(a + 1, width, width).transpose(0, 1)
        for a in range(outputs):
            for b in range(a):
                total[b, :, a] = total[a, :, b].T
            total[a, :, a].diagonal()[:-1] += strength * stretch[:-1] ** 2
        return total
