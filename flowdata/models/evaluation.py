"""Evaluation mode for a block: what a model's own `eval` does, undone exactly at the end.

A class may have a `train` of its own, which `eval` calls. It may set attributes besides `training`,
and loralib's layers add their adapters to the weight, in place, so that no gradient reaches these:
such weights are left as they were.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.models.as_loaded import putting_back

_LIBRARIES = ("torch.nn.modules.", "transformers.")
_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, and what it was back after it."""
    with as_it_was(model), without_training(model):
        yield


@contextmanager
def without_training(model: nn.Module) -> Iterator[None]:
    """Put all parts of a model into eval mode for a block; what its own `eval` changes comes back.

    Flags are for `as_it_was` to put back.
    """
    before = [_State.of(module) for module in model.modules() if _has_own_train(module)]
    if before:
        model.eval()
    undone = [state.changed() for state in before]
    for state in undone:
        if state.has_merged():
            state.put_back()
    for module in model.modules():
        module.training = False
    try:
        yield
    finally:
        for state in undone:
            state.put_back()


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, after a block, modules' modes and parts, and which parameters have a gradient.

    PEFT marks all adapters as trained when it turns them on again, the frozen ones included.
    """
    put_back = putting_back(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        put_back()
        for module, flag in modes:
            module.training = flag
        for parameter, flag in gradients:
            if parameter.requires_grad != flag:  # of a model made in inference mode none can be set
                parameter.requires_grad = flag


class _State(NamedTuple):
    """What a `train` of a module's own may change, or has changed.

    Attributes:
        module: the module.
        attributes: its own, but for its tensors and parts.
        tensors: those of its own, each with a copy.
        added: names of attributes that it didn't have.
    """

    module: nn.Module
    attributes: dict[str, Any]
    tensors: list[tuple[Tensor, Tensor]]
    added: frozenset[str] = frozenset()

    @classmethod
    def of(cls, module: nn.Module) -> _State:
        """Return a module's state."""
        tensors = (*module._parameters.values(), *module._buffers.values())
        return cls(
            module,
            {name: value for name, value in vars(module).items() if name not in _TABLES},
            [(t, t.detach().clone()) for t in tensors if t is not None and not t.is_meta],
        )

    def changed(self) -> _State:
        """Return that part of the state which the module has another now."""
        table = vars(self.module)
        return _State(
            self.module,
            {n: value for n, value in self.attributes.items() if table.get(n) is not value},
            [pair for pair in self.tensors if not torch.equal(*pair)],
            frozenset(table.keys() - self.attributes.keys() - set(_TABLES)),
        )

    def has_merged(self) -> bool:
        """Return whether tensors were changed, and a flag says that they were."""
        others = {name: value for name, value in self.attributes.items() if name != "training"}
        return bool(self.tensors) and any(isinstance(each, bool) for each in others.values())

    def put_back(self) -> None:
        """Let the module have what it had."""
        table = vars(self.module)
        for name in self.added & table.keys():
            del table[name]
        table.update(self.attributes)
        with torch.no_grad():
            for tensor, value in self.tensors:
                tensor.data.copy_(value)


def _has_own_train(module: nn.Module) -> bool:
    """Whether a module's class, and not PyTorch or transformers, says what training is.

    That of transformers swaps kernels, which the flag does not need.
    """
    home: str = type(module).train.__module__
    return not isinstance(module, torch.jit.ScriptModule) and not home.startswith(_LIBRARIES)
