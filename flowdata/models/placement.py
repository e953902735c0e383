"""Models that others have placed: sharded over ranks (FSDP2) or spread over devices (accelerate).

They are scored as they are, where they are: a copy would lose the hooks that bring their
parameters together.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn


def is_sharded(model: nn.Module) -> bool:
    """Return whether ranks hold the model together, so that they have to call it together."""
    return any(hasattr(parameter, "full_tensor") for parameter in model.parameters())


def is_placed(model: nn.Module) -> bool:
    """Return whether the model can't be moved or converted: sharded, dispatched or offloaded."""
    return is_sharded(model) or any(_hooks(module) for module in model.modules())


def home(model: nn.Module) -> torch.device:
    """Return the device on which a model takes its inputs."""
    for module in model.modules():
        for hook in _hooks(module):
            if hook.execution_device is not None:
                return torch.device(hook.execution_device)
    tensor = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
    return tensor.device


def usable_device(device: str | torch.device) -> torch.device:
    """Return a device that a user named.

    Raises:
        ValueError: there is no such device, or this machine or build of PyTorch has none.
    """
    try:
        return torch.empty(0, device=device).device
    except (RuntimeError, AssertionError, TypeError) as error:
        reason = str(error).splitlines()[0]
        raise ValueError(f"device={str(device)!r} can't be used here: {reason}") from error


@contextmanager
def whole_parameters(module: nn.Module) -> Iterator[None]:
    """Bring a module's own offloaded parameters into memory for a block."""
    hooks = [hook for hook in _hooks(module) if getattr(hook, "offload", False)]
    if not hooks:
        yield
        return
    from accelerate.utils import align_module_device  # type: ignore[import-untyped]

    with align_module_device(module):
        yield


def reshard(model: nn.Module) -> None:
    """Give back the whole parameters that FSDP2 keeps after a forward pass."""
    for module in model.modules():
        if hasattr(module, "set_reshard_after_forward"):
            module.reshard()  # type: ignore[operator]


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks of accelerate that move a module's inputs or parameters."""
    hook = getattr(module, "_hf_hook", None)
    hooks = getattr(hook, "hooks", (hook,))
    return [hook for hook in hooks if hasattr(hook, "execution_device")]
