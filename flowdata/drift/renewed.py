"""Renewed layers: those of a tuned model that have nothing in common with the old ones.

A head of several layers may have been made anew for a new task. What the meter puts back is the
last of them, the output layer; of the others it can only warn.
"""

from __future__ import annotations

import weakref

import torch.nn.functional as F
from torch import Tensor, nn

from flowdata._common.notices import warn_once
from flowdata.drift.which_head import SAME_LAYER
from flowdata.head.output_layer import Head, weight_of
from flowdata.models.placement import is_sharded

_MOST_KEPT = 4096  # numbers of each matrix by which a layer that was made anew is known
_MOST_NAMED = 3


class Renewed:
    """Tells layers that were made anew, by numbers of each matrix of the model before training.

    Args:
        model: before training.
    """

    def __init__(self, model: nn.Module) -> None:
        self._kept = {name: _some(matrix) for name, matrix in _matrices(model)}
        self._met: weakref.WeakSet[nn.Module] = weakref.WeakSet()

    def warn(self, model: nn.Module, layer: Head | nn.Module) -> None:
        """Warn of layers that have nothing in common with the old ones, once for each model.

        Args:
            model: a tuned one.
            layer: its output layer, of which it is told elsewhere.
        """
        if model in self._met:
            return
        self._met.add(model)
        head = weight_of(layer)
        renewed = [
            name
            for name, matrix in _matrices(model)
            if name in self._kept
            and (head is None or matrix.data_ptr() != head.data_ptr())
            and _has_nothing_of(self._kept[name], _some(matrix))
        ]
        if renewed:
            more = f" and {len(renewed) - _MOST_NAMED} more" * (len(renewed) > _MOST_NAMED)
            names = ", ".join(renewed[:_MOST_NAMED]) + more
            warn_once(
                f"drift: {names} have nothing in common with the model before training. If that "
                "took them so far, it is part of the drift; if they were made anew, as a head of "
                "several layers for a new task is, the old ones aren't measured, which the old "
                "task would still use: put them back before",
                about=f"renewed layers, {names}",
            )


def _has_nothing_of(old: Tensor, new: Tensor) -> bool:
    is_same_shape = old.shape == new.shape and bool(old.any() and new.any())
    return is_same_shape and bool(F.cosine_similarity(old, new, 0) <= SAME_LAYER)


def _matrices(model: nn.Module) -> list[tuple[str, Tensor]]:
    """Parameters of two dimensions and more, by name, whose values are at hand."""
    if is_sharded(model):
        return []
    return [(n, p) for n, p in model.named_parameters() if p.dim() > 1 and not p.is_meta]


def _some(matrix: Tensor) -> Tensor:
    """Some numbers of a matrix, from all over it, on the host."""
    values = matrix.detach().flatten()
    step = -(-len(values) // _MOST_KEPT) if len(values) else 1
    return values[:: step | 1].float().cpu()  # an odd step meets all columns of most matrices
