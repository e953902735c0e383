"""A model's BatchNorm layers, and those whose statistics make samples depend on each other."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger


def batch_norm_layers(model: nn.Module) -> dict[str, nn.Module]:
    """Return a model's BatchNorm layers by their names, those of all dimensions and SyncBatchNorm.

    A class of somebody's own is one if it keeps running means and variances as PyTorch's do.

    Example:
        >>> list(batch_norm_layers(nn.Sequential(nn.Linear(2, 3), nn.BatchNorm1d(3))))
        ['1']
    """
    return {name: layer for name, layer in model.named_modules() if _is_batch_norm(layer)}


def _is_batch_norm(layer: nn.Module) -> bool:
    if isinstance(layer, nn.modules.batchnorm._NormBase):  # InstanceNorm is one, too
        return isinstance(layer, nn.modules.batchnorm._BatchNorm)
    if isinstance(layer, torch.jit.ScriptModule):
        return False
    return all(isinstance(layer._buffers.get(n), Tensor) for n in ("running_mean", "running_var"))


def check_batch_norm(model: nn.Module, of: str = "loss") -> None:
    """Say which layers normalise by their batch alone, so that samples are run alone.

    Args:
        model: the model.
        of: what is made of a sample: "loss", or a noun for what no callable of the user's makes.

    Raises:
        ValueError: one of them can't run on one sample.
    """
    layers = {
        name or type(layer).__name__: layer
        for name, layer in batch_norm_layers(model).items()
        if layer.running_mean is None
    }
    if not layers:
        return
    names = ", ".join(layers)
    depends = f"a sample's {of} depends on the others in its batch"
    if any(isinstance(layer, nn.BatchNorm1d) for layer in layers.values()):
        other = ", or pass a callable loss that says which samples go together"
        raise ValueError(
            f"BatchNorm without running statistics ({names}): {depends}, and the model does not "
            f"run on one alone. Use layers with track_running_stats=True{other * (of == 'loss')}"
        )
    logger.warning(
        "BatchNorm without running statistics (%s): %s, so each is run alone",
        names,
        depends,
    )
