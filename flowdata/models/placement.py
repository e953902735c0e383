"""Models placed by others: sharded over ranks (FSDP2) or spread over devices (accelerate).

Such a model is scored as it is, where it is: a copy would lose the hooks that bring its parameters
together for a call.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowdata._common.excerpts import first_line


def is_sharded(model: nn.Module) -> bool:
    """Return whether each rank holds a part of the model, so that all must call it together."""
    # A parameter that FSDP2 has sharded is a DTensor, with this method to make it whole.
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_placed(model: nn.Module) -> bool:
    """Return whether the model can't be moved or converted: sharded, dispatched or offloaded."""
    return is_sharded(model) or any(_hooks(module) for module in model.modules())


def home(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs.

    The first hook of accelerate says so, since an offloaded parameter is on no device of its own;
    else the first parameter or buffer does; else it is PyTorch's default device.
    """
    for module in model.modules():
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    tensors = [*model.parameters(), *model.buffers(), torch.empty(0)]
    return tensors[0].device


def usable_device(device: str | torch.device) -> torch.device:
    """Return a user's device as PyTorch knows it, with its number: ``"cuda"`` is ``cuda:0``.

    Raises:
        ValueError: there is no such device, or this machine or build of PyTorch has none.

    Example:
        >>> usable_device("cpu")
        device(type='cpu')
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        raise ValueError(
            f"device={str(device)!r} can't be used here: {first_line(error)}"
        ) from error


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Bring a module's own offloaded parameters into memory for a block, without its children's."""
    hooks = [hook for hook in _hooks(module) if getattr(hook, "offload", False)]
    if not hooks:
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    with align_module_device(module):
        yield


def reshard(model: nn.Module) -> None:
    """Free the whole parameters that FSDP2 keeps after a forward pass.

    FSDP2 keeps those of the root module for a backward pass, which scoring has none of.
    """
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that move a module's inputs or parameters."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))  # a `SequentialHook` holds several
    return [hook for hook in hooks if hasattr(hook, "execution_device")]
