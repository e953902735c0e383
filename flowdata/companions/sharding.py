"""Sharded tensors: what they are, and how a tensor is brought into the form of a parameter."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

_FSDP1 = "FullyShardedDataParallel"


def is_sharded(tensor: Tensor) -> bool:
    """Return whether a tensor is a DTensor, of which each rank holds a part."""
    return hasattr(tensor, "full_tensor")


def whole(tensor: Tensor) -> Tensor:
    """Return a tensor put together from all ranks' parts; one that isn't sharded, as it is."""
    parts: Any = tensor
    return parts.full_tensor() if is_sharded(tensor) else tensor


def is_in_form(tensor: Tensor, parameter: Tensor, device: torch.device | None) -> bool:
    """Return whether `in_form` would return the tensor itself."""
    return (
        tensor.dtype == parameter.dtype
        and tensor.device == (device or parameter.device)
        and is_sharded(tensor) == is_sharded(parameter)
        and (not is_sharded(tensor) or _layout(tensor) == _layout(parameter))
    )


def in_form(tensor: Tensor, parameter: Tensor, device: torch.device | None) -> Tensor:
    """Return a tensor in a parameter's dtype, sharded as it is.

    Args:
        tensor: of the parameter's shape; where it is not sharded, every rank has it whole.
        parameter: whose form is asked for.
        device: where the tensor is kept; None means the parameter's device.
    """
    if is_sharded(tensor) and (not is_sharded(parameter) or _layout(tensor) != _layout(parameter)):
        tensor = whole(tensor)
    if is_sharded(parameter) and not is_sharded(tensor):
        from torch.distributed.tensor import distribute_tensor

        # Every rank cuts its own part out: nothing is sent.
        tensor = distribute_tensor(
            tensor.to(parameter.device, parameter.dtype), *_layout(parameter), src_data_rank=None
        )
    return tensor.to(device or parameter.device, parameter.dtype)


def is_under_fsdp2(model: nn.Module) -> bool:
    """Return whether `fully_shard` has the model, which swaps parameters during its forward."""
    if not torch.distributed.is_available():
        return False
    from torch.distributed.fsdp import FSDPModule

    return any(isinstance(module, FSDPModule) for module in model.modules())


def check_followable(model: nn.Module) -> None:
    """Raise ValueError where the parameters of a model are only parts of themselves.

    FSDP1 and DeepSpeed's ZeRO-3 leave each rank flat pieces under the parameters' names.
    """
    has_fsdp1 = any(type(module).__name__ == _FSDP1 for module in model.modules())
    if has_fsdp1 or any(hasattr(parameter, "ds_shape") for parameter in model.parameters()):
        kind = _FSDP1 if has_fsdp1 else "DeepSpeed's ZeRO-3"
        raise ValueError(
            f"model is sharded by {kind}, which keeps flat pieces of the parameters; shard it with "
            "torch.distributed.fsdp.fully_shard (FSDP2), whose parameters the anchor follows"
        )


def _layout(tensor: Any) -> tuple[Any, Any]:
    return tensor.device_mesh, tensor.placements
