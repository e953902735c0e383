"""A linear head fitted to features, to convergence: a convex problem."""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable
from typing import Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

HeadLoss: TypeAlias = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # tried from strong to weak
_TOLERANCE = 1e-7  # largest entry of the gradient at the solution, as a share of that at 0
_HELD_OUT_TOLERANCE = 1e-4  # is enough to rank the strengths
_ROWS = 8192  # rows of features in float64 at a time


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

    Minimises mean loss + strength / 2 · ‖W‖², where W acts on features brought to mean 0 each and
    variance 1 on average (the bias is free); the solution is converted back to plain features.
    One scale serves all features: a feature that is almost always 0 would otherwise get a weight
    so large that fine-tuning diverges. The problem is convex: the head's values before the call
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
    for what, given in (("features", features), ("targets", targets)):
        if not isinstance(given, Tensor):
            raise TypeError(f"{what} must be a tensor, got {type(given).__name__}")
    name = _choose_loss(targets) if loss == "auto" else loss
    if name not in _LOSSES:
        raise ValueError(f"loss must be 'auto' or one of {sorted(_LOSSES)}, got {loss!r}")
    targets = _check_targets(targets, name, len(features), head.out_features)
    _check_features(features, head.in_features)
    if strength == "held_out":
        if not isinstance(folds, int) or not 2 <= folds <= len(features):
            raise ValueError(
                "folds must be an integer between 2 and the number of samples, "
                f"{len(features)}; got {folds}"
            )
    elif isinstance(strength, str) or not 0 <= strength < float("inf"):
        raise ValueError(f"strength must be 'held_out' or a float >= 0, got {strength!r}")

    scaled, mean, scale = _standardise(features, centre=head.bias is not None)
    problem = _Problem(scaled, targets, _LOSSES[name], head.out_features, head.bias is not None)
    chosen = _best_strength(problem, folds) if strength == "held_out" else strength
    solution = problem.solve(problem.start(), chosen, _TOLERANCE)
    weight = solution[:, :-1] / scale
    with torch.no_grad():
        head.weight.copy_(weight)
        if head.bias is not None:
            head.bias.copy_(solution[:, -1] - weight @ mean)
    return head


def _cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.cross_entropy(logits, targets, reduction="sum")


def _binary_cross_entropy(logits: Tensor, targets: Tensor) -> Tensor:
    return F.binary_cross_entropy_with_logits(logits, targets, reduction="sum") / logits.shape[1]


def _mse(logits: Tensor, targets: Tensor) -> Tensor:
    return F.mse_loss(logits, targets, reduction="sum") / logits.shape[1]


_LOSSES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "cross_entropy": _cross_entropy,
    "binary_cross_entropy": _binary_cross_entropy,
    "mse": _mse,
}


class _Problem:
    """Mean loss + strength / 2 · ‖W‖² over (C, D + 1) float64 parameters, the bias last."""

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
        return self.features.new_zeros(
            self.outputs, self.features.shape[1] + 1, dtype=torch.float64
        )

    def rows(self, keep: Tensor) -> _Problem:
        return _Problem(self.features[keep], self.targets[keep], self.loss, self.outputs, self.bias)

    def mean_loss(self, parameters: Tensor, gradient: Tensor | None = None) -> float:
        """The mean loss; adds its gradient to `gradient`, a slice of the rows at a time."""
        total = 0.0
        for features, targets in zip(
            self.features.split(_ROWS), self.targets.split(_ROWS), strict=True
        ):
            rows = features.double()
            with torch.enable_grad():
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
        """The mean loss with its penalty; writes the gradient into `gradient`."""
        weight = parameters[:, :-1]
        value = self.mean_loss(parameters, gradient.zero_())
        gradient[:, :-1].add_(weight, alpha=strength)
        return value + strength / 2 * weight.square().sum().item()

    def solve(self, start: Tensor, strength: float, tolerance: float) -> Tensor:
        """The parameters of least objective; warns where they could not be reached."""
        parameters, gradient = start.clone(), torch.zeros_like(start)
        parameters.grad = gradient
        self.objective(self.start(), strength, gradient)
        wanted = tolerance * gradient.abs().max().item()
        optimizer = torch.optim.LBFGS(
            [parameters],
            max_iter=5000,
            max_eval=10000,
            history_size=20,
            tolerance_grad=wanted,
            tolerance_change=0,
            line_search_fn="strong_wolfe",
        )
        optimizer.step(lambda: self.objective(parameters, strength, gradient))
        self.objective(parameters, strength, gradient)
        if (steepest := gradient.abs().max().item()) > 100 * wanted:
            warnings.warn(
                f"the probe did not converge at strength={strength:g}: gradient {steepest:.1e}, "
                f"wanted {wanted:.1e}; a larger strength is easier to solve",
                stacklevel=4,
            )
        return parameters


def _best_strength(problem: _Problem, folds: int) -> float:
    """The strength with the smallest held-out loss, going from strong to weak until it rises."""
    shuffle = torch.Generator().manual_seed(0)
    order = torch.randperm(len(problem.features), generator=shuffle).to(problem.features.device)
    parts = order.tensor_split(folds)
    kept = [torch.cat([*parts[:fold], *parts[fold + 1 :]]) for fold in range(folds)]
    solutions = [problem.start()] * folds
    best, best_loss = STRENGTHS[0], float("inf")
    for strength in STRENGTHS:
        held_out = 0.0
        for fold in range(folds):
            # Each strength starts from the solution of the one before: they lie close together.
            solutions[fold] = problem.rows(kept[fold]).solve(
                solutions[fold], strength, _HELD_OUT_TOLERANCE
            )
            held_out += problem.rows(parts[fold]).mean_loss(solutions[fold]) / folds
        if held_out >= best_loss:
            break
        best, best_loss = strength, held_out
    return best


def _standardise(features: Tensor, *, centre: bool) -> tuple[Tensor, Tensor, float]:
    """Features of mean variance 1 (and mean 0), with the means and the scale taken out."""
    mean = features.new_zeros(features.shape[1], dtype=torch.float64)
    if centre:
        mean = features.mean(0, dtype=torch.float64)
    squares = 0.0
    for rows in features.split(_ROWS):
        squares += (rows.double() - mean).square_().sum().item()
    scale = math.sqrt(squares / features.numel()) or 1.0
    out = torch.empty_like(features, dtype=torch.promote_types(features.dtype, torch.float32))
    for target, rows in zip(out.split(_ROWS), features.split(_ROWS), strict=True):
        target.copy_((rows.double() - mean) / scale)
    return out, mean, scale


def _choose_loss(targets: Tensor) -> str:
    if targets.is_floating_point():
        return "binary_cross_entropy" if ((targets == 0) | (targets == 1)).all() else "mse"
    classes = targets.dim() == 1 and targets.dtype != torch.bool
    return "cross_entropy" if classes else "binary_cross_entropy"


def check_head(head: nn.Linear) -> None:
    """Raise TypeError unless `head` is a linear layer."""
    if not isinstance(head, nn.Linear):
        raise TypeError(f"head must be an nn.Linear, got {type(head).__name__}")


def _check_features(features: Tensor, wanted: int) -> None:
    if features.dim() != 2 or not features.is_floating_point() or features.shape[1] != wanted:
        raise ValueError(
            f"features must be floating and of shape (N, {wanted}), the head's in_features; got "
            f"{features.dtype} {tuple(features.shape)}"
        )
    _raise_first(~features.isfinite().all(1), "features", "not finite: check model and inputs")


def _check_targets(targets: Tensor, loss: str, samples: int, outputs: int) -> Tensor:
    """The targets as the loss takes them: (N,) int64 or (N, C) float64."""
    if samples == 0 or len(targets) != samples:
        raise ValueError(f"targets must be as many as features, {samples} > 0; got {len(targets)}")
    if loss == "cross_entropy":
        if targets.dim() != 1 or targets.is_floating_point() or targets.dtype == torch.bool:
            raise ValueError(
                "targets of 'cross_entropy' must be integer classes of shape (N,); got "
                f"{targets.dtype} {tuple(targets.shape)}"
            )
        bad = (targets < 0) | (targets >= outputs)
        _raise_first(bad, "targets", f"no class of a head with {outputs} outputs", targets)
        return targets.long()
    if targets.shape == (samples,) and outputs == 1:
        targets = targets[:, None]
    if targets.shape != (samples, outputs):
        raise ValueError(
            f"targets of {loss!r} must have shape {(samples, outputs)}, one value for each "
            f"output of the head; got {tuple(targets.shape)}"
        )
    _raise_first(~targets.isfinite().all(1), "targets", "not finite: drop these samples")
    if loss == "binary_cross_entropy":
        bad = ((targets != 0) & (targets != 1)).any(1)
        _raise_first(bad, "targets", "neither 0 nor 1; give loss='mse' for a regression")
    return targets.double()


def _raise_first(bad: Tensor, name: str, what: str, values: Tensor | None = None) -> None:
    if bad.any():
        first = int(bad.int().argmax())
        shown = "" if values is None else f" is {values[first].item()}:"
        raise ValueError(f"{name}[{first}]{shown} {what} ({int(bad.sum())} of {len(bad)} samples)")
