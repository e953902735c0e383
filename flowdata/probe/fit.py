"""A linear head fitted to features, to convergence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flowdata.probe.checks import (
    check_features,
    check_head,
    check_strength,
    fitting_loss,
    targets_for,
)
from flowdata.probe.problem import LOSSES, HeadLoss, HeadProblem, standardise
from flowdata.probe.strength import best_strength

_TOLERANCE = 1e-7  # largest entry of the gradient at the solution, as a share of that at 0


def fit_head(
    head: nn.Linear,
    features: Tensor,
    targets: Tensor,
    *,
    loss: HeadLoss = "auto",
    strength: float | Literal["held_out"] = "held_out",
    folds: int = 5,
) -> nn.Linear:
    """Fit a linear head to features by L-BFGS on all samples at once, in float64, and return it.

    Minimises mean loss + strength / 2 · ‖W‖², where W acts on features of mean 0 each and variance
    1 on average, and the bias is free. The solution is converted back to the features as they are.
    One scale serves all features: a feature that is almost always 0 would otherwise get a weight
    so large that fine-tuning diverges. As the problem is convex, the head's values before the call
    don't matter.

    Args:
        head: D → C; its values are replaced in place. Without a bias, features are scaled but
            not centred.
        features: (N, D) floating.
        targets: (N,) integer classes for ``"cross_entropy"``; (N, C), or (N,) where C is 1, of
            zeros and ones for ``"binary_cross_entropy"`` (multi-label); the same shapes of any
            finite values for ``"mse"`` (regression).
        loss: ``"auto"`` takes integers of shape (N,) for classes, all other targets that are 0
            or 1 for multi-label, and the rest for regression.
        strength: of the ℓ2 penalty, ≥ 0; ``"held_out"`` takes from 1, 0.1, … 1e-6 the one with
            the smallest loss on held-out folds, going down until that loss rises.
        folds: number of held-out folds.

    Returns:
        `head`.

    Raises:
        TypeError: `head` is no `nn.Linear`, features or targets are no tensors.
        ValueError: shapes or values don't fit, with the first bad sample named. The head is
            then left as it was.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [2.0]])
        >>> head = fit_head(torch.nn.Linear(1, 1), features, 2 * features + 1, strength=0.0)
        >>> round(head.weight.item(), 4), round(head.bias.item(), 4)
        (2.0, 1.0)
    """
    check_head(head)
    for name, value in (("features", features), ("targets", targets)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    loss_name = fitting_loss(targets) if loss == "auto" else loss
    if loss_name not in LOSSES:
        raise ValueError(f"loss must be 'auto' or one of {sorted(LOSSES)}, got {loss!r}")
    targets = targets_for(loss_name, targets, len(features), head.out_features)
    check_features(features, head.in_features)
    check_strength(strength, folds, len(features))

    has_bias = head.bias is not None
    scaled_features, means, scale = standardise(features, centre=has_bias)
    problem = HeadProblem(scaled_features, targets, LOSSES[loss_name], head.out_features, has_bias)
    if strength == "held_out":
        strength = best_strength(problem, folds)
    solution = problem.solve(problem.start(), strength, _TOLERANCE)
    # What W and b do to (x − mean) / scale, W / scale and b − W / scale · mean do to x.
    weight = solution[:, :-1] / scale
    with torch.no_grad():
        head.weight.copy_(weight)
        if has_bias:
            head.bias.copy_(solution[:, -1] - weight @ means)
    return head
