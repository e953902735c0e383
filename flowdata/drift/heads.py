"""Heads: which linear layer's output a network's logits are, and what the layer is given for them.

logits (B, …, C)     the layer's output, as it is or after a softmax's logarithm
logits (B, C)        the layer's output (B, T, C) at one place, as of a text's last token
other logits         no layer's: they stand for themselves
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import call_in_order, call_with
from flowdata.models.hooks import Call
from flowdata.models.tensors import to_device
from flowdata.targets.labels import split_batch
from flowdata.targets.predictions import logits_of

_ROUNDING = 1e-6  # of a logarithm of softmax in float32, as a share of its size


def name_of_head(model: nn.Module, batch: Any, device: torch.device) -> str | None:
    """Return the name of the linear layer whose output the logits are, None where there is none.

    Args:
        model: the model as it is run.
        batch: of samples that are no targets of a language model.
        device: where the model takes its inputs.

    Raises:
        ValueError: the model returns no logits, or several tensors that could be meant.
    """
    inputs = to_device(split_batch(batch)[0], device)
    outputs: dict[str, Tensor] = {}

    def note(name: str, output: Tensor) -> None:
        outputs.pop(name, None)  # what a layer makes last counts
        outputs[name] = output

    with told_of_linear_layers(model, note):
        output = (
            call_with(model, inputs)
            if isinstance(inputs, Mapping)
            else call_in_order(model, inputs)
        )
    try:
        logits = logits_of(output)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} returns no logits by which it could be compared "
            f"({str(error).partition(';')[0]}); put it into a module that returns them, of shape "
            "(B, …, C), under the name `logits`"
        ) from error
    names = [name for name, output in outputs.items() if _are_of(output, logits)]
    return names[-1] if names else None


def rows_of_call(call: Call, logits: Tensor, name: str) -> Tensor:
    """Return what a head was given for a batch's logits, (B, …, d).

    Args:
        call: the head's last.
        logits: (B, …, C), which the model returned.
        name: the head's.

    Raises:
        ValueError: the model changes what the layer made, be it of one sample.
    """
    made: Any = call.output
    if made is logits or not isinstance(made, Tensor):
        return call.input
    if made.shape == logits.shape and not _say_the_same(made, logits):
        _refuse_change(name)
    if _may_be_picked(made, logits):
        is_picked = _is_picked(made, logits)
        if not is_picked.any(1).all():
            _refuse_change(name)
        return call.input[
            torch.arange(len(logits), device=logits.device), is_picked.int().argmax(1)
        ]
    return call.input


def _refuse_change(name: str) -> None:
    raise ValueError(
        f"the model's logits are not what its output layer {name!r} makes of a row: it changes "
        "them afterwards, as a scale, a bias or a bound of its own does; so its drift can't be "
        "measured from what the layer is given"
    )


def _are_of(made: Tensor, logits: Tensor) -> bool:
    """Whether logits are what a layer made."""
    if made.shape == logits.shape:
        return _say_the_same(made, logits)
    return _may_be_picked(made, logits) and bool(_is_picked(made, logits).any(1).all())


def _say_the_same(made: Tensor, logits: Tensor) -> bool:
    """Whether both have the same values, or some the logarithms of the others' softmax."""
    one, other = made.float().nan_to_num(), logits.float().nan_to_num()
    if torch.equal(one, other):  # a model that diverged has some that are no numbers
        return True
    least = max(_ROUNDING, torch.finfo(logits.dtype).eps)
    return torch.allclose(one.log_softmax(-1), other, rtol=least, atol=least)


def _may_be_picked(made: Tensor, logits: Tensor) -> bool:
    """Whether logits (B, C) can be a layer's output (B, T, C) at one place of each sample."""
    if logits.dim() != 2 or made.dim() != 3:
        return False
    return (made.shape[0], made.shape[2]) == tuple(logits.shape)


def _is_picked(made: Tensor, logits: Tensor) -> Tensor:
    """The places (B, T) of a layer's output that have the values of the logits."""
    return (made.float().nan_to_num() == logits.float().nan_to_num()[:, None]).all(-1)


@contextmanager
def told_of_linear_layers(model: nn.Module, note: Callable[[str, Tensor], None]) -> Iterator[None]:
    """Call a function with the name and output of each linear layer, also one with adapters.

    Args:
        model: whose layers run in the block.
        note: is given a layer's name and what it made.
    """

    def noted(name: str) -> Any:
        return lambda _, __, made: note(name, made) if isinstance(made, Tensor) else None

    handles = [
        module.register_forward_hook(noted(name))
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or hasattr(module, "base_layer")
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()
