"""The output anchor: a penalty on the drift itself, while a model is trained.

    a batch of the probe ── model in training ── rows, with gradients ──┐
    the frozen model's rows of the same samples, kept by the meter ─────┴→ KL → penalty

On the training batch itself `output_penalty` does the same, from outputs that the loop has anyway
and the frozen model's, which come with the batch.

In the logits KL(base ‖ tuned) is a cross-entropy to soft labels: its gradient q − p is never longer
than that of a cross-entropy, and neither is its curvature greater. Where strength · KL makes
training diverge, it is because the strength multiplies a learning rate that was as large as
training stands. The penalty of a target is therefore strength · KL only while it pulls little (a
pseudo-Huber function of the distance √(2 KL), which is at least ‖q − p‖ by Pinsker's inequality)::

    penalty │                  ╱   slope c in √(2 KL)       P = 2 λ KL / (1 + √(1 + 2 KL λ² / c²))
            │              ╱
            │         ╱                                     ‖∂P/∂logits‖ ≤ λ ‖q − p‖ for small λ
            │ _ ─ ╱   strength · KL                         ‖∂P/∂logits‖ ≤ c for every λ
            └───────────────────── √(2 KL)

c is a fifth of what a wrong label pulls with at most. Larger strengths make the bend sharper, not
the pull stronger. A frozen output layer beside a new one with smaller weights would still pull the
body harder than the loss does, by the ratio of their weights: c is smaller by as much.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.real_numbers import RealNumber, check_factor
from flowdata._common.resumable import check_natural
from flowdata.drift.meter import DriftMeter
from flowdata.drift.several import kl_to_answers
from flowdata.drift.which_head import of_shared_classes
from flowdata.head.kl import Predictions
from flowdata.head.kl_logits import kl_of_logits
from flowdata.head.kl_loss import kl_to, kl_to_called
from flowdata.head.output_layer import Head, OutputModule, weight_of
from flowdata.models.calling import unwrapped
from flowdata.models.checkpointing import without_checkpointing
from flowdata.models.evaluation import in_evaluation

# The longest gradient of a target's penalty, in the logits; that of a cross-entropy is √2. A longer
# one lets large strengths and rates lose more than no anchor does.
_PULL = 0.2
# The strength from which the bend is as sharp as it gets: the pull is then the full one from 2e-4
# nats on. Below that a drift is the rounding of bfloat16, which must not be pulled at.
_SHARPEST = 10.0
_SMALLEST_RATIO = 1e-3  # of weights, for a new layer that starts at zero


class OutputAnchor:
    """A penalty on KL(frozen ‖ current) over a batch of a meter's probe, another in each step.

    It is strength · KL, in nats a target, while that pulls little, and bounded in its pull: no
    strength makes training diverge that goes well without it (see the file's docstring). It starts
    at 0 up to the rounding of the frozen model's rows, which are read in larger batches than they
    are trained in: at about 1e-8 nats in float32. Where the meter reads a language model in
    bfloat16, it starts at the rounding of that, ten times as much; ``dtype="float32"`` is the
    meter's to set.

    What is held says less of what is lost elsewhere: choose among anchored runs by the drift on
    another probe.

    Neither a second model nor logits are in memory: the meter has the frozen model's rows, and both
    output layers are run tile by tile, forward and backward.

    It goes into any loop as `ParameterAnchor` does, which is called without the model::

        loss + anchor(model)                  # a loop; Lightning's training_step, see below
        accelerator.backward(loss + anchor(model))          # Accelerate divides by the steps
        (loss + anchor(model) / steps).backward()           # under AccumulatedBatches, nobody does
        integrations.transformers.add_anchor(trainer, anchor)       # Trainer, SFTTrainer, Flow…

    Lightning divides what a training_step returns by n, its `accumulate_grad_batches`, also in the
    last step of an epoch, which may have k < n batches. The losses of a `FlowDataModule` are right
    there, too, and so is the penalty times n / k, k = min(n, batches − batch_idx // n · n).

    Source: a KL to the base model beside the loss: ASFT, arXiv:2509.23753; see also `DriftMeter`.

    Args:
        meter: made from the model before training.
        strength: ≥ 0; nats of loss that a nat of KL counts while the drift is small. More than 10
            does what 10 does.
        batch_size: samples of the probe in each step; all of them where the probe has fewer.
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
        self.strength = check_factor("strength", strength)
        self.meter = meter
        self.batch_size = check_natural("batch_size", batch_size, least=1)
        self.seed = check_natural("seed", seed)
        self._step = 0

    def __call__(self, model: nn.Module) -> Tensor:
        """Return the penalty: 0-d float32, with gradients for the model's parameters.

        It is 0 where no sample of the step has a target.

        Args:
            model: in training; dropout and BatchNorm are as in evaluation for this call, and
                activations are not checkpointed in it: `batch_size` bounds what they take.

        Raises:
            TypeError: the weight of the output layer is sharded (a DTensor).
            ValueError: see `DriftMeter`.
        """
        places = self._places()
        self._step += 1
        model = unwrapped(model)
        with in_evaluation(model), without_checkpointing(), self.meter.batch_norm_in(model):
            rows = self.meter.reader.read_in_training(model, places)
        base = self.meter.base_of(places, rows.values.device)
        module: Any = rows.layer
        is_own = self.meter.is_own(module)
        if self.meter.has_several_labels:
            tuned = Predictions(rows.values, _InEvaluation(module) if is_own else base.layer)
            divergence = kl_to_answers(base, tuned)
        else:
            layer = _in_training(module) if is_own else base.layer
            tuned = Predictions(rows.values, layer)
            if self.meter.reader.is_of_language:
                base, tuned = of_shared_classes(base, tuned)
            divergence = _divergence(base, tuned)
        ratio = 1.0 if is_own else _ratio(module, base.layer)
        return _bounded(divergence, self.strength, ratio)

    def _places(self) -> list[int]:
        """The samples of this step: a window of an endless sequence of random orders."""
        size = len(self.meter)
        count = min(self.batch_size, size)
        first = self._step * count
        return [
            int(self._order(place // size)[place % size]) for place in range(first, first + count)
        ]

    def _order(self, number: int) -> Tensor:
        generator = torch.Generator().manual_seed(self.seed * 1_000_003 + number)
        return torch.randperm(len(self.meter), generator=generator)


def output_penalty(
    outputs: Tensor,
    reference: Tensor,
    strength: RealNumber,
    *,
    head: nn.Linear | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
) -> Tensor:
    """Return the penalty of `OutputAnchor` on the training batch itself, without another forward.

    The frozen model's outputs of all training samples are those of a `DriftMeter` over them. For a
    new task's new head they are the old network's, on the new task's images; its labels play no
    part. `FlowWeightedDataset` hands them out with the samples and weights.

    Of a language model with adapters give what its output layer is given, at target positions, with
    the adapters on and with them off (PEFT's ``disable_adapter()``), and the layer as `head`: no
    logits are then held, forward or backward.

    Args:
        outputs: (n, C) floating logits of the model in training; with `head` (n, d), its inputs.
            BatchNorm in evaluation mode makes them those that the frozen model began with.
        reference: the frozen model's, in the same shape; gets no gradient.
        strength: as for `OutputAnchor`.
        head: the output layer of both, d → C, which is not trained.
        softcap: bound of the head's logits, or None, as for `fused_causal_lm_loss`.
        logit_scale: factor on the head's logits.

    Returns:
        0-d, the mean over the n targets; 0 without any. It is float32, but float64 of float64
        `outputs` without `head`.

    Raises:
        TypeError, ValueError: `strength` is no finite number ≥ 0, the shapes differ or are not
            those of rows, or the head is trained or no plain linear layer.

    Example:
        >>> from torch.utils.data import DataLoader, TensorDataset
        >>> from flowdata import DriftMeter, FlowWeightedDataset, weighted_mean
        >>> _ = torch.manual_seed(0)
        >>> body, old_head, new_head = nn.Linear(4, 8), nn.Linear(8, 3), nn.Linear(8, 2)
        >>> data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 1, 0, 1, 0]))
        >>> meter = DriftMeter(nn.Sequential(body, old_head), data)  # before training
        >>> train = FlowWeightedDataset(data, torch.ones(6), reference=meter.outputs())
        >>> for (inputs, targets), weights, reference in DataLoader(train, batch_size=6):
        ...     features = body(inputs)
        ...     losses = nn.functional.cross_entropy(new_head(features), targets, reduction="none")
        ...     penalty = output_penalty(old_head(features), reference, strength=0.1)
        ...     loss = weighted_mean(losses, weights) + penalty
        >>> abs(round(penalty.item(), 6))
        0.0
    """
    strength = check_factor("strength", strength)
    if outputs.dim() != 2 or outputs.shape != reference.shape:
        raise ValueError(
            f"outputs and reference must both be (n, C), or with head (n, d), got "
            f"{tuple(outputs.shape)} and {tuple(reference.shape)}; of sequences take the rows of "
            "positions that have a target"
        )
    reference = reference.detach().to(outputs.device)
    if head is None:
        return _bounded(kl_of_logits(reference, outputs), strength)
    if type(head) is not nn.Linear or head.weight.requires_grad:
        raise ValueError(
            f"head must be a plain nn.Linear that is not trained, got {type(head).__name__}: the "
            "frozen model's outputs are made by it, too. Where the output layer itself is trained "
            "or has adapters, use OutputAnchor, whose meter keeps the frozen one"
        )
    bias = None if head.bias is None else head.bias.detach()
    layer = Head(head.weight.detach(), bias, logit_scale, softcap)
    options: Any = {"scale": logit_scale, "softcap": softcap}
    divergence = kl_to(Predictions(reference, layer), outputs, layer.weight, bias, **options)
    return _bounded(divergence, strength)


def _bounded(divergence: Tensor, strength: float, ratio: Tensor | float = 1.0) -> Tensor:
    """The mean penalty of targets from the KL of each, (n,); see the file's docstring."""
    strength, pull = min(strength, _SHARPEST), _PULL * ratio
    bend = (1 + 2 * divergence * (strength / pull) ** 2).sqrt()
    return (2 * strength * divergence / (1 + bend)).sum() / max(1, len(divergence))  # 0 of none


@torch.no_grad()
def _ratio(module: nn.Module, frozen: Head | nn.Module) -> Tensor | float:
    """How much smaller the weights of a class are in the model's own layer, at most 1."""
    new, old = weight_of(module), weight_of(frozen)
    if new is None or old is None:
        return 1.0
    new_size, old_size = (weight.float().square().mean().sqrt() for weight in (new, old))
    ratio: Tensor = (new_size / old_size).nan_to_num(1.0).clamp(_SMALLEST_RATIO, 1.0)  # of zeros
    return ratio


def _divergence(base: Predictions, tuned: Predictions) -> Tensor:
    """KL(base ‖ tuned) of every row, with gradients through the tuned model's output layer."""
    layer = tuned.layer
    if isinstance(layer, Head):
        options: Any = {"scale": layer.scale, "softcap": layer.softcap}
        return kl_to(base, tuned.rows, layer.weight, layer.bias, **options)
    return kl_to_called(base, tuned.rows, _InEvaluation(layer))


def _in_training(module: OutputModule) -> Head | nn.Module:
    """An output layer of a model in training, read where it can be, with its gradients."""
    layer: Any = module.layer
    if type(layer) is not nn.Linear or module.bias is not None:
        return module
    if hasattr(layer.weight, "full_tensor"):
        raise TypeError(
            "the output layer's weight is sharded (a DTensor), so that its gradients could not be "
            "put together; let FSDP leave it whole after the model's forward: fully_shard(model, "
            "reshard_after_forward=False) of the whole model, whose layers may have True"
        )
    return Head(layer.weight, layer.bias, module.scale, module.softcap)


class _InEvaluation(nn.Module):
    """An output layer whose dropout is off whenever it is called, in the backward pass too."""

    def __init__(self, layer: nn.Module) -> None:
        super().__init__()
        self.layer = layer

    def forward(self, rows: Tensor) -> Tensor:
        with in_evaluation(self.layer):
            logits: Tensor = self.layer(rows)
        return logits
