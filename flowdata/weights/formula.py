"""The formula exp(−loss / temperature): every weight of a data set is made here."""

from __future__ import annotations

import torch
from torch import Tensor

from flowdata._common.chunks import CHUNK
from flowdata.weights.temperature import RelativeTemperature


def weigh(losses: Tensor, temperature: float) -> Tensor:
    """Return the weights of losses at a resolved temperature.

    Args:
        losses: of any shape, floating, non-negative; not checked.
        temperature: as `resolve_temperature` returns it. At a `RelativeTemperature` weights are
            relative to its smallest loss; a still smaller one weighs 1, too.

    Returns:
        float32 of the shape and on the device of `losses`, in [0, 1].

    Example:
        >>> import torch
        >>> weigh(torch.tensor([6.0, 7.0, 8.0]), RelativeTemperature(1.0, smallest_loss=7.0))
        tensor([1.0000, 1.0000, 0.3679])
    """
    origin = temperature.smallest_loss if isinstance(temperature, RelativeTemperature) else 0.0
    flat = losses.detach().reshape(-1)
    weights = torch.empty(flat.shape, dtype=torch.float32, device=losses.device)
    for out, part in zip(weights.split(CHUNK), flat.split(CHUNK), strict=True):
        excess = part.to(torch.float64, copy=True).sub_(origin).clamp_min_(0)
        # A division, since the reciprocal of a subnormal temperature would be infinite, and
        # infinity times a loss of 0 is NaN.
        out.copy_(excess.div_(-temperature).exp_())
    return weights.view(losses.shape)
