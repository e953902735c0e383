"""The model as it was loaded: what a call changes in it is not there for the next one.

rotary frequencies    stretched by the longest call so far         → flowdata/models/rope.py
parts, and words      BigBird swaps its attention for good when a  → put back after each call
                      short text comes, and keeps the kind's name
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from flowdata.models.rope import loaded_frequencies


@contextmanager
def as_loaded(model: nn.Module) -> Iterator[None]:
    """Run a block as if the model had not been called before; at the end it is as it was."""
    put_back = putting_back(model)
    with loaded_frequencies(model):
        try:
            yield
        finally:
            put_back()


def putting_back(model: nn.Module) -> Callable[[], None]:
    """Return what puts a model's parts back as they are now, and attributes that are words.

    It is called after each call of the model, and takes a fraction of a millisecond where nothing
    has changed. TorchScript's modules can't swap their parts.
    """
    modules = (each for each in model.modules() if not isinstance(each, torch.jit.ScriptModule))
    before = [(module, dict(module._modules), _words(module)) for module in modules]

    def put_back() -> None:
        for module, parts, words in before:
            if any(module._modules.get(name) is not part for name, part in parts.items()):
                module._modules.update(parts)
            vars(module).update(words)

    return put_back


def _words(module: nn.Module) -> dict[str, str]:
    """A module's own attributes that are words. Numbers may count calls, or lengths of caches."""
    return {name: value for name, value in vars(module).items() if isinstance(value, str)}
