"""A new head on a frozen body, fitted to convergence: the first and the last step of FLOW's recipe.

A task that the pre-trained model has no head for gets one here (its losses then make the
weights), and after fine-tuning the same call fits the head anew on the fine-tuned body.
The body runs once; what is optimised afterwards is convex in the head alone.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Mapping
from itertools import chain
from pathlib import Path
from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata.fingerprint import fingerprint_callable, fingerprint_model
from flowdata.progress import progress_bar
from flowdata.rng import preserved_rng
from flowdata.scores import content_identity
from flowdata.scoring.precision import map_tensors, name_of, resolve_dtype, scoring_model
from flowdata.scoring.tasks import call_with, split_batch
from flowdata.store_files import check_identity, make_manifest, read_file, write_file

ProbeLoss: TypeAlias = Literal["auto", "cross_entropy", "binary_cross_entropy", "mse"]

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # tried from strong to weak
_TOLERANCE = 1e-7  # largest entry of the gradient at the solution, as a share of that at 0
_HELD_OUT_TOLERANCE = 1e-4  # is enough to rank the strengths
_ANOTHER_FILE = "Name another file, or delete this one if its features are unwanted"
_ROWS = 8192  # rows of features in float64 at a time


def linear_probe(
    model: nn.Module,
    head: nn.Linear,
    dataset: Any,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 256,
    loss: ProbeLoss = "auto",
    strength: float | Literal["held_out"] = "held_out",
    folds: int = 5,
    dtype: str | torch.dtype = "auto",
    num_workers: int = 0,
    store: str | Path | None = None,
    dataset_id: str | None = None,
    progress: bool = True,
) -> nn.Linear:
    """Fit a linear head on the features of a frozen body and return it.

    The features are computed once, with the model in eval mode (BatchNorm uses its stored
    statistics) and no gradients; the head is then fitted by `fit_head`. On a fine-tuned body
    this is also the recipe's last step, the second round that trains only the head.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, section 5 (steps 1 and 4 of the vision
    recipe).

    Args:
        model: the body; maps a batch's inputs to features, (B, D). Comes back as it went in:
            training flags, parameters, gradients and the random state are untouched.
        head: D → C; its values are replaced in place, wherever it lives.
        dataset: samples that `collate_fn` turns into batches ``(inputs, targets)``; a tuple or
            list of inputs is passed on as positional arguments, a mapping as keyword arguments.
            A mapping with ``"labels"`` among its keys serves as a batch, too. Augment nothing here:
            give the data set its evaluation transform.
        collate_fn: as for `torch.utils.data.DataLoader`.
        batch_size: samples in one forward pass.
        loss: see `fit_head`.
        strength: see `fit_head`.
        folds: see `fit_head`.
        dtype: of the body's pass, as for `LossScorer`: ``"auto"`` is bfloat16 where the device
            is fast at it. The head is fitted in float64 in any case.
        num_workers: as for `torch.utils.data.DataLoader`.
        store: see `compute_features`.
        dataset_id: see `compute_features`.
        progress: shows a bar while the features are computed.

    Returns:
        `head`.

    Raises:
        TypeError: `head` is no `nn.Linear`, or a batch is not made of inputs and targets.
        ValueError: `dataset` is empty, features or targets don't fit the head, or a value is not
            finite (first sample named). The head is then left as it was.
        ScoreMismatchError, StoreError: see `compute_features`.

    Example:
        >>> import torch
        >>> points = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> data = torch.utils.data.TensorDataset(points, torch.tensor([0, 0, 1, 1]))
        >>> head = linear_probe(torch.nn.Identity(), torch.nn.Linear(1, 2), data,
        ...                     strength=0.1, progress=False)
        >>> head(points).argmax(1).tolist()
        [0, 0, 1, 1]
    """
    _check_head(head)
    features, targets = compute_features(
        model,
        dataset,
        collate_fn=collate_fn,
        batch_size=batch_size,
        dtype=dtype,
        num_workers=num_workers,
        store=store,
        dataset_id=dataset_id,
        progress=progress,
    )
    return fit_head(head, features, targets, loss=loss, strength=strength, folds=folds)


def compute_features(
    model: nn.Module,
    dataset: Any,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 256,
    dtype: str | torch.dtype = "auto",
    num_workers: int = 0,
    store: str | Path | None = None,
    dataset_id: str | None = None,
    progress: bool = True,
) -> tuple[Tensor, Tensor]:
    """Return the features and the targets of every sample, in the data set's order.

    Args:
        model: the body, in whatever mode; see `linear_probe`, as for the rest.
        dataset: see `linear_probe`.
        collate_fn: see `linear_probe`.
        batch_size: samples in one forward pass.
        dtype: see `linear_probe`.
        num_workers: as for `torch.utils.data.DataLoader`.
        store: a file, ``*.safetensors``, that keeps the features. The same call again reads them
            without running the body; another body, data set or dtype is refused.
        dataset_id: names the data set's content for `store`; None fingerprints its samples.
        progress: shows a bar.

    Returns:
        Features, (N, D) float32 (float64 from a float64 model), and targets, (N,) or (N, C),
        both on the model's device.

    Raises:
        TypeError: a batch is not made of inputs and targets, or the body returns no tensor.
        ValueError: `dataset` is empty, or the features are not (B, D).
        ScoreMismatchError: `store` holds features of another body, data set or dtype.
        StoreError: `store` is damaged, or no file of features.
    """
    own = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    scored = resolve_dtype(dtype, model, own.device)

    def compute() -> tuple[Tensor, Tensor]:
        return _features(model, dataset, collate_fn, batch_size, scored, num_workers, progress)

    if store is None:
        return compute()
    with preserved_rng():
        identity = {
            "kind": "features",
            "body": fingerprint_model(model),
            "dataset": content_identity(dataset) if dataset_id is None else dataset_id,
            "num_samples": len(dataset),
            "collate_fn": fingerprint_callable(collate_fn),
            "dtype": name_of(scored),
        }
    features, targets = _stored(Path(store), identity, compute)
    return features.to(own.device), targets.to(own.device)


def _stored(
    file: Path, identity: dict[str, Any], compute: Callable[[], tuple[Tensor, Tensor]]
) -> tuple[Tensor, Tensor]:
    """What the file holds, if it is of this identity; else computed, and kept there."""
    if file.suffix != ".safetensors":
        raise ValueError(
            f"store must name a file *.safetensors for the features, got {str(file)!r}"
        )
    if file.exists():
        tensors, manifest = read_file(file)
        check_identity(manifest["identity"], identity, f"the file {file}", _ANOTHER_FILE)
        return tensors["feature"], tensors["target"]
    features, targets = compute()
    kept = {"feature": features.cpu(), "target": targets.cpu()}
    write_file(file, kept, make_manifest(identity, {}, {}))
    return features, targets


def _features(
    model: nn.Module,
    dataset: Any,
    collate_fn: Callable[[list[Any]], Any] | None,
    batch_size: int,
    dtype: torch.dtype,
    num_workers: int,
    progress: bool,
) -> tuple[Tensor, Tensor]:
    own = next(chain(model.parameters(), model.buffers()), torch.empty(0))
    # A generator of the loader's own: the default one would advance the global random state.
    loader: DataLoader[Any] = DataLoader(
        dataset,
        batch_size=batch_size,
        collate_fn=collate_fn,
        num_workers=num_workers,
        generator=torch.Generator(),
    )
    features, targets = [], []
    with (
        preserved_rng(),
        scoring_model(model, dtype, own.device) as body,
        progress_bar(len(dataset), "features", "samples", shown=progress) as advance,
    ):
        for batch in loader:
            inputs, target = split_batch(map_tensors(batch, lambda t: t.to(own.device)))
            if target is None:
                raise TypeError(
                    "collate_fn must give batches (inputs, targets) or mappings with 'labels'; "
                    f"got {type(batch).__name__}"
                )
            feature = _call(body, inputs)
            if not isinstance(feature, Tensor):
                raise TypeError(
                    f"model must return a tensor of features, got {type(feature).__name__}; "
                    "wrap it in a module that picks one"
                )
            if feature.dim() != 2 or len(feature) != len(target):
                raise ValueError(
                    f"model must return features of shape (B, D); got {tuple(feature.shape)} "
                    f"for a batch of {len(target)} targets"
                )
            features.append(feature if feature.dtype == torch.float64 else feature.float())
            targets.append(target)
            advance(len(target))
    if not features:
        raise ValueError("dataset is empty: a probe needs at least one sample")
    return torch.cat(features), torch.cat(targets)


def fit_head(
    head: nn.Linear,
    features: Tensor,
    targets: Tensor,
    *,
    loss: ProbeLoss = "auto",
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
        TypeError: `head` is no `nn.Linear`.
        ValueError: shapes or values don't fit, with the first bad sample named. The head is
            then left as it was.

    Example:
        >>> import torch
        >>> features = torch.tensor([[0.0], [1.0], [2.0]])
        >>> head = fit_head(torch.nn.Linear(1, 1), features, 2 * features + 1, strength=0.0)
        >>> round(head.weight.item(), 4), round(head.bias.item(), 4)
        (2.0, 1.0)
    """
    _check_head(head)
    name = _choose_loss(targets) if loss == "auto" else loss
    if name not in _LOSSES:
        raise ValueError(f"loss must be 'auto' or one of {sorted(_LOSSES)}, got {loss!r}")
    targets = _check_targets(targets, name, len(features), head.out_features)
    _check_features(features, head.in_features)
    if strength == "held_out":
        if not 2 <= folds <= len(features):
            raise ValueError(
                f"folds must lie between 2 and the number of samples, {len(features)}; got {folds}"
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
    out = torch.empty_like(features)
    for target, rows in zip(out.split(_ROWS), features.split(_ROWS), strict=True):
        target.copy_((rows.double() - mean) / scale)
    return out, mean, scale


def _call(model: nn.Module, inputs: Any) -> Any:
    if isinstance(inputs, Mapping):
        return call_with(model, inputs)
    return model(*inputs) if isinstance(inputs, (tuple, list)) else model(inputs)


def _choose_loss(targets: Tensor) -> str:
    if targets.is_floating_point():
        return "binary_cross_entropy" if ((targets == 0) | (targets == 1)).all() else "mse"
    classes = targets.dim() == 1 and targets.dtype != torch.bool
    return "cross_entropy" if classes else "binary_cross_entropy"


def _check_head(head: nn.Linear) -> None:
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
