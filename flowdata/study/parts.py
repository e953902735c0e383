"""The parts of methods: what they change in the training beside the weights."""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from flowdata.companions.anchor import ParameterAnchor
from flowdata.companions.averaging import wise_ft
from flowdata.drift import DriftMeter, OutputAnchor
from flowdata.models.batch_norm import batch_norm_layers
from flowdata.study.extras import load_extra
from flowdata.study.training import Hooks, Part


def anchor(kind: Literal["l2", "l1"], strength: float) -> Part:
    """Return the penalty `ParameterAnchor` on the distance from where training starts."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        yield Hooks(penalty=ParameterAnchor(model, kind, strength))

    return part


def output_anchor(meter: DriftMeter, strength: float, batch_size: int = 32) -> Part:
    """Return the penalty `OutputAnchor` on the drift from the model that the meter was made of."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        penalty = OutputAnchor(meter, strength, batch_size, seed=seed)
        yield Hooks(penalty=lambda: penalty(model))

    return part


def weight_averaging(alpha: float) -> Part:
    """Return WiSE-FT: at the end α of the fine-tuned weights and 1 − α of those before."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        yield Hooks()
        model.load_state_dict(wise_ft(start, model.state_dict(), alpha))

    return part


@contextmanager
def fixed_batch_norm(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
    """Train with BatchNorm in evaluation mode: its statistics stay as they were before."""
    for layer in batch_norm_layers(model).values():
        layer.eval()
    yield Hooks()


def lora(rank: int) -> Part:
    """Return LoRA on every linear and convolutional layer, merged at the end (Hu et al., 2022).

    It needs peft, which the extra `study` brings.
    """

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        peft = load_extra("peft", "rows with LoRA")
        kinds = nn.Linear | nn.Conv2d
        layers = [re.escape(n) for n, m in model.named_modules() if isinstance(m, kinds)]
        # "all-linear" leaves a language model's head out. peft takes the word for models of
        # transformers only; for other models it needs the names of the layers.
        targets = "all-linear" if hasattr(model, "config") else "|".join(layers)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        trainable_parameters = [p for p in model.parameters() if p.requires_grad]
        model_with_adapters = peft.get_peft_model(model, config)
        yield Hooks()
        model_with_adapters.merge_and_unload()
        for parameter in trainable_parameters:  # peft froze them
            parameter.requires_grad_(True)

    return part


def mofo(share: float) -> Part:
    """Return momentum-filtered updates: only a parameter's entries of largest momentum move.

    Source: MoFO, arXiv:2407.20999 (there with Adam, whose first moment is the momentum).

    Args:
        share: share of a parameter's entries that move; at least one of them does.
    """

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        before: dict[nn.Parameter, Tensor] = {}

        def copy_parameters(step: int, optimizer: Optimizer) -> None:
            for p in model.parameters():
                if p.grad is not None:
                    before[p] = p.detach().clone()

        # The optimiser updates momentum and parameters in one step, so the entries that may move
        # are known only after it. The others are put back.
        @torch.no_grad()
        def put_back(step: int, optimizer: Optimizer) -> None:
            for p, old in before.items():
                state = optimizer.state[p]
                momentum = state.get("exp_avg", state.get("momentum_buffer")).abs().flatten()
                count = max(1, round(share * len(momentum)))
                moves = torch.zeros_like(momentum, dtype=torch.bool)
                moves[momentum.topk(count, sorted=False).indices] = True
                p.copy_(torch.where(moves.view_as(p), p, old))

        yield Hooks(before_step=copy_parameters, after_step=put_back)

    return part


def hft(rounds: int) -> Part:
    """Return half fine-tuning: each round trains a random half of the parameter blocks.

    A block has the parameters of one layer. Source: HFT, arXiv:2404.18466.
    """

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        blocks = _blocks(model)

        def freeze(step: int, optimizer: Optimizer) -> None:
            # The half depends on seed and round alone, so that it is the same in all steps of a
            # round.
            generator = torch.Generator().manual_seed(seed * rounds + step * rounds // steps)
            order = torch.randperm(len(blocks), generator=generator)
            for index in order[: len(blocks) // 2].tolist():
                for p in blocks[index]:
                    p.grad = None  # the optimiser then skips it, momentum and decay included

        yield Hooks(before_step=freeze)

    return part


def _blocks(model: nn.Module) -> list[list[nn.Parameter]]:
    """The parameters of each layer that has any; a tied one belongs to its first layer."""
    blocks: list[list[nn.Parameter]] = []
    earlier_parameters: set[nn.Parameter] = set()
    for module in model.modules():
        parameters = list(module.parameters(recurse=False))
        blocks.append([p for p in parameters if p not in earlier_parameters])
        earlier_parameters.update(parameters)
    return [block for block in blocks if block]


@contextmanager
def averaging(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
    """End with the mean of the weights after each step and those of the start."""
    mean = {n: v.detach().clone() for n, v in model.state_dict().items() if v.is_floating_point()}

    def add(step: int, optimizer: Optimizer) -> None:
        state = model.state_dict()
        for name, value in mean.items():
            # mean += (weights − mean) / n: with the start, step 0 brings the second term.
            value.lerp_(state[name].detach(), 1 / (step + 2))

    yield Hooks(after_step=add)
    model.load_state_dict(mean, strict=False)
