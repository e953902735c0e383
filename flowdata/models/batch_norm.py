"""BatchNorm without running statistics, which makes samples depend on each other."""

from __future__ import annotations

from torch import nn

from flowdata._common.notices import logger


def check_batch_norm(model: nn.Module) -> None:
    """Say which layers normalise by their batch alone, so that samples are scored alone.

    Raises:
        ValueError: one of them can't run on one sample.
    """
    layers = {
        name or type(module).__name__: module
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    }
    if not layers:
        return
    names = ", ".join(layers)
    if any(isinstance(layer, nn.BatchNorm1d) for layer in layers.values()):
        raise ValueError(
            f"BatchNorm without running statistics ({names}): a sample's loss depends on the "
            "others in its batch, and the model does not run on one alone. Use layers with "
            "track_running_stats=True, or pass a callable loss that says which samples go together"
        )
    logger.warning(
        "BatchNorm without running statistics (%s): a sample's loss depends on the others in its "
        "batch, so each is scored alone",
        names,
    )
