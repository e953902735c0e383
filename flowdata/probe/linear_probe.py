"""A new head on a frozen body, fitted to convergence: the first and the last step of FLOW's recipe.

A task that the pre-trained model has no head for gets one here (its losses then make the
weights), and after fine-tuning the same call fits the head anew on the fine-tuned body.
The body runs once; what is optimised afterwards is the head alone, a convex problem.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn

from flowdata.probe.checks import check_head, check_strength
from flowdata.probe.features import compute_features
from flowdata.probe.fit import fit_head
from flowdata.probe.problem import HeadLoss


def linear_probe(
    model: nn.Module,
    head: nn.Linear,
    dataset: Any,
    *,
    collate_fn: Callable[[list[Any]], Any] | None = None,
    batch_size: int = 256,
    loss: HeadLoss = "auto",
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
            give the data set its evaluation transform. One that augments is said, by a few samples
            that are read a few times.
        collate_fn: as for `torch.utils.data.DataLoader`.
        batch_size: samples in one forward pass.
        loss: see `fit_head`.
        strength: see `fit_head`.
        folds: see `fit_head`.
        dtype: of the body's pass: ``"auto"`` is the body's own dtype, so that the head is the same
            whatever the machine is fast at, and float32 for a body without parameters. The head is
            fitted in float64 in any case.
        num_workers: as for `torch.utils.data.DataLoader`.
        store: see `compute_features`.
        dataset_id: see `compute_features`.
        progress: shows a bar while the features are computed, and where the fits take long.

    Returns:
        `head`.

    Raises:
        TypeError: `head` is no plain `nn.Linear`, `dataset` is a stream, or a batch is not made of
            inputs and targets.
        ValueError: `dataset` is empty, features or targets don't fit the head, a value is not
            finite (first sample named), or see `fit_head`. The head is then left as it was.
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
    check_head(head)
    check_strength(strength, folds)  # before the body runs, which may take long
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
    return fit_head(
        head, features, targets, loss=loss, strength=strength, folds=folds, progress=progress
    )
