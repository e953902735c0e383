"""The convex problem of a linear head on fixed features, and its solver."""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.probe.scaling import ROWS

HeadLoss: TypeAlias = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]
LossAndSlope: TypeAlias = Callable[[Tensor, Tensor], tuple[Tensor, Tensor]]

_CURVATURE = 0.25  # of a loss by a standardised feature's weight, about
_LEAST_SLOPE = 1e-5  # a start this flat is a solution: what is left of its gradient is rounding


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
            start: where L-BFGS begins.
            strength: of the penalty.
            tolerance: the largest entry of the gradient at the solution, as a share of the one at
                parameters of 0.
        """
        # W / stretch is as curved as the bias, which the penalty leaves alone: L-BFGS needs several
        # times fewer steps under strong penalties.
        stretch = start.new_ones(start.shape[1])
        stretch[:-1] = (1 + strength / _CURVATURE) ** -0.5
        parameters, gradient = start / stretch, torch.zeros_like(start)
        parameters.grad = gradient

        def objective(parameters: Tensor) -> float:
            value = self.objective(parameters * stretch, strength, gradient)
            gradient.mul_(stretch)
            return value

        objective(self.start())
        flat_enough = tolerance * max(gradient.abs().max().item(), _LEAST_SLOPE)
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
        # The line search leaves the gradient of the last point tried, not that of the best one.
        objective(parameters)
        # Rounding may end the descent a little short of the tolerance; that does no harm.
        if (steepest := gradient.abs().max().item()) > 100 * flat_enough:
            logger.warning(
                "the probe did not converge at strength=%g: gradient %.1e, wanted %.1e; "
                "a larger strength is easier to solve",
                strength,
                steepest,
                flat_enough,
            )
        return parameters * stretch
