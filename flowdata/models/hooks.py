"""Hooks: what a model's layers are given and return during a block, and giving them another input.

Every hook is removed when its block ends, however it ends.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import NamedTuple

from torch import Tensor, nn


class Call(NamedTuple):
    """One call of a layer.

    Attributes:
        input: the layer's first argument.
        output: what the layer returned.
    """

    input: Tensor
    output: Tensor


@contextmanager
def last_call(layers: Iterable[nn.Module]) -> Iterator[list[Call]]:
    """Record the last call of any of the layers: a list that is empty until the first call.

    Earlier calls are dropped at once, because the activations of a whole model would fill the
    memory. Without layers nothing is recorded.

    Example:
        >>> import torch
        >>> layer = nn.Linear(2, 3)
        >>> with last_call([layer]) as calls:
        ...     output = layer(torch.ones(1, 2))
        >>> calls[0].output is output
        True
    """
    calls: list[Call] = []

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[:] = [Call(args[0], output)]

    handles = [layer.register_forward_hook(record) for layer in layers]
    try:
        yield calls
    finally:
        for handle in handles:
            handle.remove()


@contextmanager
def replaced_input(layer: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Give a layer `replace(input)` in place of its first argument; record the original inputs.

    The list holds one tensor for each call, in their order.
    """
    originals: list[Tensor] = []

    def swap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        originals.append(args[0])
        return (replace(args[0]), *args[1:])

    handle = layer.register_forward_pre_hook(swap)
    try:
        yield originals
    finally:
        handle.remove()


@contextmanager
def told_of_calls(model: nn.Module, tell: Callable[[], None]) -> Iterator[None]:
    """Call a function after each call of a model in a block."""
    handle = model.register_forward_hook(lambda *_: tell())
    try:
        yield
    finally:
        handle.remove()
