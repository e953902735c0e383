"""The methods that are compared, and the one training loop that all of them share.

A method says what weighs the samples (or tokens) and which parts change the training. A part is
a context manager around the whole of it: it may change the model on the way in, act in every
step through `Hooks`, and change the model again on the way out.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack, contextmanager
from dataclasses import dataclass
from functools import partial
from types import SimpleNamespace
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from flowdata.companions.anchor import ParameterAnchor
from flowdata.companions.averaging import wise_ft
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.streaming import FlowWeightedIterable
from flowdata.token_weights import TokenRule, selective_token_weights
from flowdata.weights import effective_sample_size, flow_weights

StepHook = Callable[[int, Optimizer], None]


def _nothing(step: int, optimizer: Optimizer) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What a part does in each step: adds to the loss, acts before or after the update."""

    penalty: Callable[[], Tensor | float] = float
    before_step: StepHook = _nothing
    after_step: StepHook = _nothing


Part = Callable[[nn.Module, int, int], AbstractContextManager[Hooks]]  # model, steps, seed


@dataclass(frozen=True)
class Method:
    """One way to fine-tune; the defaults are standard fine-tuning.

    Attributes:
        weights: makes (N,) sample weights, or one for each target token, from the scores of the
            frozen model; None weighs all alike.
        resample: draw the samples in proportion to their weights instead.
        rule: weights from the current model's own losses, see `flowdata.token_weights`.
        parts: what else is done; entered in order, left in reverse.
        trains: False leaves the model as it is, but for its head.
    """

    weights: Callable[[Scores], Tensor] | None = None
    resample: bool = False
    rule: TokenRule | None = None
    parts: tuple[Part, ...] = ()
    trains: bool = True


def train(
    model: nn.Module,
    batches: Iterable[Any],
    steps: int,
    loss: Callable[[Any], Tensor],
    make_optimizer: Callable[[list[nn.Parameter]], Optimizer],
    method: Method,
    *,
    seed: int,
    warmup: float = 0.0,
) -> None:
    """Train in place: `steps` batches, cosine schedule after a linear warm-up."""
    with ExitStack() as stack:
        hooks = [stack.enter_context(part(model, steps, seed)) for part in method.parts]
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine(step, steps, warmup)
        )
        model.train()
        for step, batch in enumerate(batches):
            optimizer.zero_grad()
            value = loss(batch)
            for hook in hooks:
                value = value + hook.penalty()
            value.backward()
            for hook in hooks:
                hook.before_step(step, optimizer)
            optimizer.step()
            schedule.step()
            for hook in hooks:
                hook.after_step(step, optimizer)


def cosine(step: int, steps: int, warmup: float) -> float:
    """The share of the learning rate at a step: up in a line, then down along a cosine."""
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(steps - rise, 1)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(progress, 1.0))).item())


def passes(loader: DataLoader[Any], epochs: int) -> Iterator[Any]:
    """Give a loader's batches, epoch after epoch."""
    for epoch in range(epochs):
        sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]
        if isinstance(sampler, FlowSampler):
            sampler.set_epoch(epoch)
        yield from loader


# --- parts -----------------------------------------------------------------------------------


def anchor(kind: Literal["l2", "l1"], strength: float) -> Part:
    """The penalty `ParameterAnchor` on the distance from where training starts."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        yield Hooks(penalty=ParameterAnchor(model, kind, strength))

    return part


def weight_averaging(alpha: float) -> Part:
    """WiSE-FT: α of the fine-tuned weights and 1 − α of those before."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        start = {name: value.clone() for name, value in model.state_dict().items()}
        yield Hooks()
        model.load_state_dict(wise_ft(start, model.state_dict(), alpha))

    return part


def lora(rank: int) -> Part:
    """LoRA on every linear and convolutional layer, merged at the end (Hu et al., 2022)."""

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        import peft

        kinds = nn.Linear | nn.Conv2d
        layers = [re.escape(n) for n, m in model.named_modules() if isinstance(m, kinds)]
        chosen = "all-linear" if hasattr(model, "config") else "|".join(layers)
        config = peft.LoraConfig(r=rank, lora_alpha=rank, target_modules=chosen)
        trainable = [p for p in model.parameters() if p.requires_grad]
        adapted = peft.get_peft_model(model, config)
        yield Hooks()
        adapted.merge_and_unload()
        for parameter in trainable:
            parameter.requires_grad_(True)

    return part


def mofo(share: float) -> Part:
    """Momentum-filtered updates: in each parameter only the entries of largest momentum move.

    Source: MoFO, arXiv:2407.20999 (there with Adam, whose first moment is the momentum).
    """

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        before: dict[nn.Parameter, Tensor] = {}

        def keep(step: int, optimizer: Optimizer) -> None:
            for p in model.parameters():
                if p.grad is not None:
                    before[p] = p.detach().clone()

        @torch.no_grad()
        def put_back(step: int, optimizer: Optimizer) -> None:
            for p, old in before.items():
                state = optimizer.state[p]
                momentum = state.get("exp_avg", state.get("momentum_buffer")).abs().flatten()
                count = max(1, round(share * len(momentum)))
                moves = torch.zeros_like(momentum, dtype=torch.bool)
                moves[momentum.topk(count, sorted=False).indices] = True
                p.copy_(torch.where(moves.view_as(p), p, old))

        yield Hooks(before_step=keep, after_step=put_back)

    return part


def hft(rounds: int) -> Part:
    """Half fine-tuning: each round trains a random half of the parameter blocks.

    A block is what one layer owns. Source: HFT, arXiv:2404.18466.
    """

    @contextmanager
    def part(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
        owned = [list(module.parameters(recurse=False)) for module in model.modules()]
        blocks: list[list[nn.Parameter]] = []
        taken: set[nn.Parameter] = set()  # a tied parameter belongs to its first layer
        for own in owned:
            blocks.append([p for p in own if p not in taken])
            taken.update(own)
        blocks = [block for block in blocks if block]

        def freeze(step: int, optimizer: Optimizer) -> None:
            generator = torch.Generator().manual_seed(seed * rounds + step * rounds // steps)
            order = torch.randperm(len(blocks), generator=generator)
            for index in order[: len(blocks) // 2].tolist():
                for p in blocks[index]:
                    p.grad = None  # the optimiser leaves it alone, momentum and decay included

        yield Hooks(before_step=freeze)

    return part


@contextmanager
def averaging(model: nn.Module, steps: int, seed: int) -> Iterator[Hooks]:
    """The mean of the weights along the way, the start included, in place of the last ones."""
    mean = {n: v.detach().clone() for n, v in model.state_dict().items() if v.is_floating_point()}

    def add(step: int, optimizer: Optimizer) -> None:
        now = model.state_dict()
        for name, value in mean.items():
            value.lerp_(now[name].detach(), 1 / (step + 2))

    yield Hooks(after_step=add)
    model.load_state_dict(mean, strict=False)


# --- weights ---------------------------------------------------------------------------------


def flow(scores: Scores, temperature: str = "median", column: str = "loss") -> Tensor:
    """FLOW's sample weights."""
    return scores.weights(temperature, column=column)


def normalised(scores: Scores) -> Tensor:
    """FLOW's weights over their mean: steps as large as those of standard fine-tuning."""
    weights = scores.weights()
    return weights / weights.mean()


def even(scores: Scores) -> Tensor:
    """FLOW's mean weight for every sample: what its smaller steps do by themselves."""
    return torch.full((len(scores),), scores.weights().mean().item())


def running_median(scores: Scores, window: int = 128) -> Tensor:
    """FLOW's weights as a stream gives them: each window under the median of all so far."""
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)).tolist()
    scorer = SimpleNamespace(
        score=lambda window, **_: SimpleNamespace(losses=scores.losses[list(window)])
    )
    stream = FlowWeightedIterable(order, scorer, window=window)
    weights = torch.empty(len(scores))
    for index, weight in stream:
        weights[index] = weight
    return weights


def dro(scores: Scores) -> Tensor:
    """exp(+loss / temperature) over its mean, as unequal as FLOW's weights are.

    The temperature is the one that gives FLOW's effective sample size: under FLOW's own the
    hardest sample alone would outweigh all the others.
    """
    share = effective_sample_size(scores.weights()) / len(scores)
    from_top = scores.losses.max() - scores.losses
    return flow_weights(from_top, temperature=f"ess{share:.9f}", normalize="mean")


def flow_tokens(scores: Scores) -> Tensor:
    """FLOW's token weights, the median taken over all target tokens."""
    return flow_weights(_token_losses(scores))


def flow_both(scores: Scores) -> Tensor:
    """Token weights times the weight of their sequence."""
    return flow_tokens(scores) * scores.weights().repeat_interleave(scores.counts)


def easy_tokens(scores: Scores) -> Tensor:
    """Selective token masking: 1 for tokens the frozen model finds easy, 0 for the others."""
    return selective_token_weights(_token_losses(scores))


def _token_losses(scores: Scores) -> Tensor:
    if scores.flat_token_losses is None:
        raise ValueError("token weights need scores with token losses; vision has none")
    return scores.flat_token_losses


# --- the field -------------------------------------------------------------------------------

STANDARD = Method()
COMPANIONS: dict[str, tuple[Part, ...]] = {
    "l2": (anchor("l2", 1e-2),),
    "l1": (anchor("l1", 1e-4),),
    "LoRA": (lora(8),),
    "WiSE-FT": (weight_averaging(0.5),),
}
METHODS: dict[str, Method] = {
    "standard": STANDARD,
    "linear probe": Method(trains=False),
    "FLOW": Method(flow),
    "FLOW, sampler": Method(flow, resample=True),
    **{name: Method(parts=parts) for name, parts in COMPANIONS.items()},
    "MoFO": Method(parts=(mofo(0.15),)),
    "HFT": Method(parts=(hft(4),)),
    "DRO": Method(dro),
    "averaging": Method(parts=(averaging,)),
    **{
        f"FLOW + {name}": Method(flow, parts=COMPANIONS[name]) for name in ("l2", "LoRA", "WiSE-FT")
    },
}
TEMPERATURES = ("q0.1", "q0.25", "q0.75", "mean", "ess0.1", "ess0.25", "ess0.5", "ess0.9")
ABLATIONS: dict[str, Method] = {
    **{f"FLOW, {rule}": Method(partial(flow, temperature=rule)) for rule in TEMPERATURES},
    "FLOW, running median": Method(running_median),
    "FLOW normalised": Method(normalised),
    "standard, smaller steps": Method(even),
    "FLOW, gradient norm": Method(partial(flow, column="gradient_norm")),
    **{f"l2, {strength:g}": Method(parts=(anchor("l2", strength),)) for strength in (1e-3, 1e-1)},
    **{f"WiSE-FT, {alpha:g}": Method(parts=(weight_averaging(alpha),)) for alpha in (0.25, 0.75)},
}
LANGUAGE_ONLY: dict[str, Method] = {
    "TALR": Method(rule="talr"),
    "DFT": Method(rule="dft"),
    "FLOW, tokens": Method(flow_tokens),
    "FLOW, both": Method(flow_both),
    "token masking": Method(easy_tokens),
}
