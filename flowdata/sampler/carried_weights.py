"""The weights that the samples of a data set carry, also through views of it.

Subset([b, c]) of FlowWeightedDataset(a, b, c)                    weights of b and c
ConcatDataset of FlowWeightedDataset(a, b) and of (c, d)          weights of a, b, c and d
"""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch.utils.data import ConcatDataset, Subset

from flowdata.dataset import FlowWeightedDataset

_MANY = 16  # samples that two unlike kinds of weights would hardly put into one order


def carried_weights(dataset: Any) -> NDArray[np.float32] | None:
    """Return the weight of each sample, (N,) float32; None where not all carry one.

    Args:
        dataset: a `FlowWeightedDataset`, or PyTorch's views of such, inside one another; anything
            else, a class made of these views too, carries none, as it may take the weights off.

    Example:
        >>> import torch
        >>> weighted = FlowWeightedDataset(["a", "b", "c"], torch.tensor([1.0, 0.5, 0.25]))
        >>> carried_weights(ConcatDataset([Subset(weighted, [2, 0]), weighted])).tolist()
        [0.25, 1.0, 1.0, 0.5, 0.25]
    """
    if isinstance(dataset, FlowWeightedDataset):
        return dataset.weights.numpy()
    if _gives_samples_of(Subset, dataset):
        weights = carried_weights(dataset.dataset)
        return None if weights is None else weights[np.asarray(dataset.indices, dtype=np.int64)]
    if _gives_samples_of(ConcatDataset, dataset):
        found = [carried_weights(part) for part in dataset.datasets]
        parts = [weights for weights in found if weights is not None]
        return np.concatenate(parts) if len(parts) == len(found) else None
    return None


def _gives_samples_of(view: type, dataset: Any) -> bool:
    """Whether a data set is a view that gives samples as the view's own class does."""
    is_own = getattr(type(dataset), "__getitem__", None) is getattr(view, "__getitem__", None)
    return isinstance(dataset, view) and is_own


def are_alike(weights: NDArray[Any], others: NDArray[Any]) -> bool:
    """Return whether weights are those of others, up to a factor, and not all the same.

    Those that put many samples into the same order are of the same losses, too, at another
    temperature or under a cap.
    """
    if len(weights) != len(others) or not others.any():
        return False
    shares, other_shares = (each.astype(np.float64) / each.sum() for each in (weights, others))
    if np.ptp(shares) == 0 or np.ptp(other_shares) == 0:
        return False
    if np.allclose(shares, other_shares, rtol=1e-4, atol=0):
        return True
    order = np.lexsort((other_shares, shares))
    return len(weights) >= _MANY and bool((np.diff(other_shares[order]) >= 0).all())
