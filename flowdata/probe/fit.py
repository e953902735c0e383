"""A linear head fitted to features, to convergence."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata.probe.checks import check_features, check_head, check_strength
from flowdata.probe.problem import LOSSES, HeadLoss, HeadProblem
from flowdata.probe.scaling import Columns, measure_columns, measure_values
from flowdata.probe.strength import best_strength, strengths_for
from flowdata.probe.targets import check_targets, fitting_loss, strata, targets_for

_TOLERANCE = 1e-7  # largest entry of the gradient at the solution, as a share of that at 0
_LOUD_ROUNDING = 0.05  # of the spread of the outputs: what the head's dtype may add to them unsaid


def fit_head(
    head: nn.Linear,
    features: Tensor,
    targets: Tensor,
    *,
    loss: HeadLoss = "auto",
    strength: float | Literal["held_out"] = "held_out",
    folds: int = 5,
    progress: bool = True,
) -> nn.Linear:
    """Fit a linear head to features on all samples at once, in float64, and return it.

    Minimises mean loss + strength / 2 · ‖W‖², where W acts on features of mean 0 and variance 1,
    each column by itself, and the bias is free; the values of a regression are standardised too.
    The solution is converted back to the features as they are. A column that varies by no more than
    its values are rounded gets no weight, and one in which a single sample differs no large one.
    As the problem is convex, the head's values before the call don't matter.

    Args:
        head: D → C; its values are replaced in place. Without a bias, features are scaled but
            not centred.
        features: (N, D) floating.
        targets: for ``"cross_entropy"`` (N,) or (N, 1) integer classes, or (N, C) probabilities of
            classes; for ``"binary_cross_entropy"`` (N, C), or (N,) where C is 1, between 0 and 1
            (multi-label); for ``"mse"`` the same shapes of any finite values (regression).
        loss: ``"auto"`` takes integers (N,) or (N, 1) for classes where the head has several
            outputs, floating rows that sum to 1 for probabilities of classes, all other targets
            that are 0 or 1 for multi-label, and the rest for regression.
        strength: of the ℓ2 penalty, ≥ 0; ``"held_out"`` takes from 100, 10, … 1e-6 the one with
            the smallest loss on held-out folds. Where features outnumber samples it begins
            higher, at 100 times their ratio. A warning says where the first or last was the best;
            between the others the loss is interpolated.
        folds: number of held-out folds, ≥ 2, with equal shares of the classes; with fewer samples
            there are as many folds as samples.
        progress: shows it where the fits take more than a few seconds.

    Returns:
        `head`.

    Raises:
        TypeError: `head` is no plain `nn.Linear`, features or targets are no tensors.
        ValueError: shapes or values don't fit, with the first bad sample named; all samples are of
            one class; nothing tells what the targets mean; the head's dtype can't hold the
            solution. The head is then left as it was.

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
    targets = check_targets(targets, len(features)).to(features.device)
    loss_name = fitting_loss(targets, head.out_features) if loss == "auto" else loss
    if loss_name not in LOSSES:
        raise ValueError(f"loss must be 'auto' or one of {sorted(LOSSES)}, got {loss!r}")
    targets = targets_for(loss_name, targets, len(features), head.out_features)
    features = features.detach()
    check_features(features, head.in_features)
    check_strength(strength, folds)

    has_bias = head.bias is not None
    # Half a head's precision is no reason to drop a column: what it adds to a logit is as rounded.
    rounding = min(torch.finfo(head.weight.dtype).eps, torch.finfo(torch.float32).eps)
    columns = measure_columns(features, centre=has_bias, rounding=rounding)
    if columns.scales.isinf().all():
        logger.warning("no feature varies over the samples: the probe's head gets no weights")
        strength = 0.0  # there is nothing to choose it for
    values = None
    if loss_name == "mse":
        values = measure_values(targets, centre=has_bias)
        targets = values.standardise(targets)
    solution = _solution(
        columns.standardise(features),
        targets,
        loss_name,
        head,
        strength,
        int(folds),
        progress=progress,
    )
    _fill(head, solution, columns, values)
    return head


def _solution(
    features: Tensor,
    targets: Tensor,
    loss: str,
    head: nn.Linear,
    strength: float | Literal["held_out"],
    folds: int,
    *,
    progress: bool,
) -> Tensor:
    """The parameters of least objective on standardised features, (C, D + 1) float64."""
    samples, width = features.shape
    # The penalty makes the rows of W sums of samples. Where these are fewer than features,
    # features = R Q with Q (N, D) orthonormal: the problem on R, (N, N), has the same solution.
    basis = None
    if samples < width:
        basis, triangle = torch.linalg.qr(features.T.double())
        features = triangle.T
    problem = HeadProblem(features, targets, LOSSES[loss], head.out_features, head.bias is not None)
    if isinstance(strength, str):
        strengths = strengths_for(samples, width)
        groups = strata(loss, targets)
        strength = best_strength(problem, strengths, groups, folds, progress=progress)
    solution = problem.solve(problem.start(), float(strength), _TOLERANCE)
    if basis is None:
        return solution
    return torch.cat([solution[:, :-1] @ basis.T, solution[:, -1:]], 1)


def _fill(head: nn.Linear, solution: Tensor, columns: Columns, values: Columns | None) -> None:
    """Write into a head what a solution on standardised columns does to them as they are.

    What W and b do to (x − mean) / scale, W / scale and b − W / scale · mean do to x.
    """
    weight, bias = solution[:, :-1] / columns.scales, solution[:, -1]
    if values is not None:
        weight, bias = weight * values.scales[:, None], bias * values.scales + values.means
    # The bias takes up what rounding the weights to the head's dtype does at the features' means.
    dtype = head.weight.dtype
    rounded_weight = weight.to(dtype)
    exact_bias = bias - rounded_weight.double() @ columns.means
    rounded_bias = exact_bias.to(dtype)
    if not (rounded_weight.isfinite().all() and rounded_bias.isfinite().all()):
        smallest = int(columns.scales.argmin())
        raise ValueError(
            f"head: its {dtype} can't hold the solution; features[:, {smallest}] has a standard "
            f"deviation of {columns.scales[smallest].item():.1e}. Scale the features, or give a "
            "float32 or float64 head"
        )
    with torch.no_grad():
        head.weight.copy_(rounded_weight)
        if head.bias is not None:
            head.bias.copy_(rounded_bias)
    scales = torch.where(columns.scales.isinf(), 0, columns.scales)
    spread = (weight * scales).norm(dim=1)
    error = ((rounded_weight - weight) * scales).norm(dim=1)
    if head.bias is not None:
        error = error + (rounded_bias - exact_bias).abs()
    if (error > _LOUD_ROUNDING * spread.max()).any() and spread.max() > 0:
        logger.warning(
            "the head's %s rounds its outputs by %.1e, where the features move them by %.1e: take "
            "the mean out of features and targets, or give a head of a wider dtype",
            dtype,
            error.max(),
            spread.max(),
        )
