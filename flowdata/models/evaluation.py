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

_TABLES = ("_parameters", "_buffers", "_modules")


@contextmanager
def in_evaluation(model: nn.Module) -> Iterator[None]:
    """Put a model into eval mode for a block, and what it was back after it."""
    with as_it_was(model):
        stop_training(model)
        yield


def stop_training(model: nn.Module) -> None:
    """Put all parts of a model into eval mode; weights that this would change stay as they are."""
    own = _of_own_trains(model)
    if own:
        model.eval()
    for state in own:
        if state.has_merged():
            state.put_back()
    for module in model.modules():
        module.training = False


@contextmanager
def as_it_was(model: nn.Module) -> Iterator[None]:
    """Put back, after a block, modules' modes and parts, and which parameters have a gradient.

    PEFT marks all adapters as trained when it turns them on again, the frozen ones included.
    """
    put_back = putting_back(model)
    own = _of_own_trains(model)
    modes = [(module, module.training) for module in model.modules()]
    gradients = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
    try:
        yield
    finally:
        put_back()
        for state in own:
            state.put_back()
        for module, flag in modes:
            module.training = flag
        for parameter, flag in gradients:
            if parameter.requires_grad != flag:  # of a model made in inference mode none can be set
                parameter.requires_grad = flag


class _State(NamedTuple):
    """What a `train` of a module's own may change.

    Attributes:
        module: the module.
        attributes: its own, but for its tensors and parts.
        tensors: those of its own, each with a copy.
    """

    module: nn.Module
    attributes: dict[str, Any]
    tensors: list[tuple[Tensor, Tensor]]

    def has_merged(self) -> bool:
        """Return whether the module has changed its tensors, and noted that it did."""
        table = vars(self.module)
        flags = [name for name, value in self.attributes.items() if isinstance(value, bool)]
        has_noted = any(
            table.get(each) != self.attributes[each] for each in flags if each != "training"
        )
        return has_noted and any(not torch.equal(*pair) for pair in self.tensors)

    def put_back(self) -> None:
        """Let the module have what it had."""
        table = vars(self.module)
        for name in table.keys() - self.attributes.keys() - set(_TABLES):
            del table[name]
        table.update(self.attributes)
        with torch.no_grad():
            for tensor, value in self.tensors:
                if not torch.equal(tensor, value):
                    tensor.data.copy_(value)


def _of_own_trains(model: nn.Module) -> list[_State]:
    """The states of those modules whose classes have a `train` of their own."""
    return [
        _State(
            module,
            {name: value for name, value in vars(module).items() if name not in _TABLES},
            [
                (tensor, tensor.detach().clone())
                for tensor in (*module._parameters.values(), *module._buffers.values())
                if tensor is not None and not tensor.is_meta
            ],
        )
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        and type(module).train is not nn.Module.train
    ]
