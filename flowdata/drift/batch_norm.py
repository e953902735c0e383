"""BatchNorm as the old task would be served: the frozen model's layers around a tuned body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.batch_norm import batch_norm_layers
from flowdata.models.placement import is_sharded


class BatchNormState:
    """A copy of the parameters and statistics of a model's BatchNorm layers.

    Args:
        model: the model to copy them of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._copies = {
            name: {each: value.detach().clone() for _, each, value in _tensors(layer)}
            for name, layer in batch_norm_layers(model).items()
        }

    @contextmanager
    def put_into(self, model: nn.Module, head: str | None = None) -> Iterator[None]:
        """Let a model's BatchNorm layers have the copy's tensors for a block.

        The model's own are put aside, not written over: the same objects come back.

        Args:
            model: the model.
            head: the name of the frozen model's output layer. Layers in what has taken its place
                stay as they are, since the frozen layer is what is measured.

        Raises:
            ValueError: the model has other BatchNorm layers.
        """
        pairs = self._pairs(model, head)
        old = [(table, name, value) for layer, _ in pairs for table, name, value in _tensors(layer)]
        try:
            for layer, copies in pairs:
                for table, name, value in _tensors(layer):
                    tensor = copies[name].to(value.device, value.dtype)
                    is_parameter = isinstance(value, nn.Parameter)
                    table[name] = nn.Parameter(tensor, False) if is_parameter else tensor
            yield
        finally:
            for table, name, value in old:
                table[name] = value

    def _pairs(
        self, model: nn.Module, head: str | None
    ) -> list[tuple[nn.Module, dict[str, Tensor]]]:
        """A model's layers, each with the copy of its name, or else of its place in the order."""
        layers = batch_norm_layers(model)
        if head is not None and head not in self._copies:
            layers = {n: each for n, each in layers.items() if not f"{n}.".startswith(f"{head}.")}
        if layers.keys() == self._copies.keys():
            pairs = [(layer, self._copies[name]) for name, layer in layers.items()]
        else:  # a wrapper gives all of them other names
            pairs = list(zip(layers.values(), self._copies.values(), strict=False))
        shapes = [
            ({name: value.shape for _, name, value in _tensors(layer)}, _shapes(copies))
            for layer, copies in pairs
        ]
        if len(layers) != len(self._copies) or any(own != other for own, other in shapes):
            raise ValueError(
                f"the model has {len(layers)} BatchNorm layers, the frozen model had "
                f"{len(self._copies)}, or their shapes differ: the frozen model's can't be put in "
                "their place; pass batch_norm='own' to measure the model with its own"
            )
        if layers and is_sharded(model):
            raise ValueError(
                "the model is sharded, so that the frozen model's BatchNorm layers can't be put "
                "in the place of its own; pass batch_norm='own'"
            )
        return pairs


def _shapes(tensors: dict[str, Tensor]) -> dict[str, torch.Size]:
    return {name: value.shape for name, value in tensors.items()}


def _tensors(layer: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A layer's parameters and buffers, each with the table that holds it."""
    tables: list[dict[str, Any]] = [layer._parameters, layer._buffers]
    return [(table, name, t) for table in tables for name, t in table.items() if t is not None]
