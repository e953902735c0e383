"""BatchNorm as the old task would be served: the frozen model's layers around a tuned body."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn

from flowdata.models.batch_norm import batch_norm_layers
from flowdata.models.placement import is_sharded


class BatchNormState:
    """A copy of the parameters and statistics of a model's BatchNorm layers.

    Args:
        model: the model to copy them of.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers = [
            {name: value.detach().clone() for _, name, value in _tensors(layer)}
            for layer in batch_norm_layers(model).values()
        ]

    @contextmanager
    def put_into(self, model: nn.Module) -> Iterator[None]:
        """Let a model's BatchNorm layers have the copy's tensors for a block.

        The model's own are put aside, not written over: the same objects come back.

        Raises:
            ValueError: the model has other BatchNorm layers.
        """
        layers = list(batch_norm_layers(model).values())
        self._check(model, layers)
        old = [(table, name, value) for layer in layers for table, name, value in _tensors(layer)]
        try:
            for layer, copies in zip(layers, self._layers, strict=True):
                for table, name, value in _tensors(layer):
                    tensor = copies[name].to(value.device, value.dtype)
                    is_parameter = isinstance(value, nn.Parameter)
                    table[name] = nn.Parameter(tensor, False) if is_parameter else tensor
            yield
        finally:
            for table, name, value in old:
                table[name] = value

    def _check(self, model: nn.Module, layers: list[nn.Module]) -> None:
        shapes = [{name: value.shape for _, name, value in _tensors(layer)} for layer in layers]
        expected = [{name: value.shape for name, value in copy.items()} for copy in self._layers]
        if shapes != expected:
            raise ValueError(
                f"the model has {len(layers)} BatchNorm layers, the frozen model had "
                f"{len(expected)}, or their shapes differ: the frozen model's can't be put in "
                "their place; pass batch_norm='own' to measure the model with its own"
            )
        if layers and is_sharded(model):
            raise ValueError(
                "the model is sharded, so that the frozen model's BatchNorm layers can't be put "
                "in the place of its own; pass batch_norm='own'"
            )


def _tensors(layer: nn.Module) -> list[tuple[dict[str, Any], str, Tensor]]:
    """A layer's parameters and buffers, each with the table that holds it."""
    tables: list[dict[str, Any]] = [layer._parameters, layer._buffers]
    return [(table, name, t) for table in tables for name, t in table.items() if t is not None]
