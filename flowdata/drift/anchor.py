"""The output anchor: a penalty on the drift itself, while a model is trained.

    a batch of the probe ── model in training ── rows, with gradients ──┐
    the frozen model's rows of the same samples, kept by the meter ─────┴→ log(1 + KL)

KL(base ‖ tuned) has no bound: where the tuned model rules out what the frozen one found likely, one
target can outweigh a whole batch, and its gradient pushes a large step further away. The logarithm
divides the gradient of a target by 1 + KL, so that a target in nats is pulled back at full strength
while the drift is small, and no target pulls harder the farther away it is.
"""

from __future__ import annotations

import sys
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.real_numbers import RealNumber, real_number
from flowdata._common.resumable import check_natural
from flowdata.drift.meter import DriftMeter
from flowdata.head.kl import Predictions
from flowdata.head.kl_loss import kl_to, kl_to_called
from flowdata.head.output_layer import Head, OutputModule
from flowdata.models.calling import in_evaluation, unwrapped


class OutputAnchor:
    """A penalty on KL(frozen ‖ current) over a batch of a meter's probe, another in each step.

    Neither a second model nor logits are in memory: the meter has the frozen model's rows, and both
    output layers are run tile by tile, forward and backward.

    Source: a KL to the base model beside the loss: ASFT, arXiv:2509.23753; see also `DriftMeter`.

    Args:
        meter: made from the model before training.
        strength: ≥ 0; factor of the mean over targets of log(1 + KL).
        batch_size: samples of the probe in each step.
        seed: of the order in which they come; every sample comes once before any comes twice.

    Raises:
        TypeError, ValueError: an argument that is none of these.

    Example:
        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> anchor = OutputAnchor(DriftMeter(model, torch.randn(9, 4)), strength=0.1)
        >>> float(anchor(model))  # in a loop: loss = loss + anchor(model)
        0.0
    """

    def __init__(
        self, meter: DriftMeter, strength: RealNumber, batch_size: int = 16, *, seed: int = 0
    ) -> None:
        if not isinstance(meter, DriftMeter):
            raise TypeError(f"meter must be a DriftMeter, got {type(meter).__name__}")
        largest = sys.float_info.max
        self.strength = real_number(strength, "strength must be finite and >= 0", 0, largest)
        self.meter = meter
        self.batch_size = check_natural("batch_size", batch_size, least=1)
        self.seed = check_natural("seed", seed)
        self._step = 0

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty: 0-d float32, with gradients for the model's parameters.

        Args:
            model: in training; dropout and BatchNorm are as in evaluation for this call.
        """
        places = self._places()
        self._step += 1
        model = unwrapped(model)
        with in_evaluation(model), self.meter.batch_norm_in(model):
            rows = self.meter.reader.read_in_training(model, places)
        base = self.meter.base_of(places, rows.values.device)
        module: Any = rows.layer
        divergence = _divergence(base, rows.values, module, self.meter.is_own(module))
        return self.strength * torch.log1p(divergence).mean()

    def _places(self) -> list[int]:
        """The samples of this step: a window of an endless sequence of random orders."""
        size = len(self.meter)
        first = self._step * self.batch_size
        return [
            int(self._order(place // size)[place % size])
            for place in range(first, first + min(self.batch_size, size))
        ]

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.meter), generator=generator)


def _divergence(base: Predictions, rows: Tensor, module: OutputModule, is_own: bool) -> Tensor:
    """KL(base ‖ tuned) of every row, through the model's own output layer or the frozen one."""
    layer = module.layer if is_own else base.layer
    if isinstance(layer, Head):
        return kl_to(base, rows, layer.weight, layer.bias, scale=layer.scale, softcap=layer.softcap)
    if is_own and type(layer) is nn.Linear:
        scale, softcap = module.scale, module.softcap
        return kl_to(base, rows, layer.weight, layer.bias, scale=scale, softcap=softcap)
    called: Any = module if is_own else layer
    return kl_to_called(base, rows, called)
