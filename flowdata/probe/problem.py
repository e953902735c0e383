"""The convex problem of a linear head on fixed features, and its solver."""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata._common.notices import logger

HeadLoss: TypeAlias = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]

_ROWS = (
    8192  # rows of features in float64 at a time; all of them would take twice the features' memory
)


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]


def _mse(logits: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(logits, targets, reduction="sum") / logits.shape[1]


# Sums over the samples of a slice, each sample's loss being the mean over its outputs.
LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
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
        self,
        features: Tensor,
        targets: Tensor,
        loss: Callable[[Tensor, Tensor], Tensor],
        outputs: int,
        bias: bool,
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
        for features, targets in zip(
            self.features.split(_ROWS), self.targets.split(_ROWS), strict=True
        ):
            rows = features.double()
            with torch.enable_grad():
                # Autograd goes from the loss to the logits alone. From there the gradient is a
                # product with the rows, which goes straight into `gradient`, slice by slice.
                logits = (rows @ parameters[:, :-1].T + parameters[:, -1]).requires_grad_()
                loss = self.loss(logits, targets) / len(self.features)
                if gradient is not None:
                    (slope,) = torch.autograd.grad(loss, logits)
                    gradient[:, :-1].addmm_(slope.T, rows)
                    if self.bias:
                        gradient[:, -1] += slope.sum(0)
            total += loss.item()
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
                parameters of 0. A share needs no unit: targets in millions end as exactly.
        """
        parameters, gradient = start.clone(), torch.zeros_like(start)
        parameters.grad = gradient
        self.objective(self.start(), strength, gradient)
        flat_enough = tolerance * gradient.abs().max().item()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=5000,
            max_eval=10000,
            history_size=20,
            tolerance_grad=flat_enough,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self.objective(parameters, strength, gradient))
        # The line search leaves the gradient of the last point tried, not that of the best one.
        self.objective(parameters, strength, gradient)
        # Rounding may end the descent a little short of the tolerance; that does no harm.
        if (steepest := gradient.abs().max().item()) > 100 * flat_enough:
            logger.warning(
                "the probe did not converge at strength=%g: gradient %.1e, wanted %.1e; "
                "a larger strength is easier to solve",
                strength,
                steepest,
                flat_enough,
            )
        return parameters


def standardise(features: Tensor, *, centre: bool) -> tuple[Tensor, Tensor, float]:
    """Return features of mean variance 1 (and mean 0), with the means and the scale taken out.

    Args:
        features: (N, D) floating.
        centre: whether the means are taken out; a head without bias can't put them back.

    Returns:
        Features, (N, D) in float32 or wider; the means, (D,) float64, 0 without `centre`; and the
        one scale of all features.
    """
    means = features.new_zeros(features.shape[1], dtype=torch.float64)
    if centre:
        means = features.mean(0, dtype=torch.float64)
    squares = 0.0
    for rows in features.split(_ROWS):
        squares += (rows.double() - means).square_().sum().item()
    scale = math.sqrt(squares / features.numel()) or 1.0
    scaled = torch.empty_like(features, dtype=torch.promote_types(features.dtype, torch.float32))
    for target, rows in zip(scaled.split(_ROWS), features.split(_ROWS), strict=True):
        target.copy_((rows.double() - means) / scale)
    return scaled, means, scale
