"""BatchNorm's parameters and statistics, which an old head needs on a fine-tuned body."""

from __future__ import annotations

from torch import Tensor, nn

from flowdata.models.batch_norm import batch_norm_layers


def batch_norm_state(model: nn.Module) -> dict[str, Tensor]:
    """Return a copy of all BatchNorm parameters and statistics, by their state dict names.

    A copy from before fine-tuning lets the old head work on the fine-tuned body again:
    ``model.load_state_dict(state, strict=False)``.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, section 5: how accuracy on the
    pre-training task is measured after vision fine-tuning.

    Example:
        >>> import torch
        >>> model = torch.nn.Sequential(torch.nn.Linear(2, 3), torch.nn.BatchNorm1d(3))
        >>> sorted(batch_norm_state(model))[:3]
        ['1.bias', '1.num_batches_tracked', '1.running_mean']
    """
    return {
        f"{path}.{name}".lstrip("."): value.detach().clone()
        for path, layer in batch_norm_layers(model).items()
        for name, value in layer.state_dict().items()
    }
