"""What a method is, and the one training loop that all methods share.

A method says what weighs the samples (or their tokens) and which parts change the training. A part
is a context manager around the whole of it: it may change the model on the way in, act in every
step through `Hooks`, and change the model again on the way out.

    enter parts ──► step 0, 1, 2, … ──► leave parts, the last one first
                    loss + penalties
                    backward
                    before_step
                    optimizer, schedule
                    after_step
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from contextlib import AbstractContextManager, ExitStack
from dataclasses import dataclass
from typing import Any, TypeAlias

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.utils.data import DataLoader

from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.token_weights import TokenRule

StepHook: TypeAlias = Callable[[int, Optimizer], None]  # the step's number and the optimiser


def _nothing(step: int, optimizer: Optimizer) -> None: ...


@dataclass(frozen=True)
class Hooks:
    """What a part does in each step.

    Attributes:
        penalty: gives what is added to the loss.
        before_step: called when the gradients are there and the update is still to come.
        after_step: called after the update.
    """

    penalty: Callable[[], Tensor | float] = float
    before_step: StepHook = _nothing
    after_step: StepHook = _nothing


Part: TypeAlias = Callable[[nn.Module, int, int], AbstractContextManager[Hooks]]
"""Takes the model, the number of steps and the seed."""


@dataclass(frozen=True)
class Method:
    """One way to fine-tune; the defaults are standard fine-tuning.

    Attributes:
        weights: makes (N,) sample weights, or one for each target token, from the scores of the
            frozen model; None weighs all alike.
        resample: draw the samples in proportion to their weights, and leave the loss unweighted.
        rule: makes token weights from the current model's own losses, see
            `flowdata.token_weights`; for loops over language.
        parts: what else is done; entered in order, left in reverse.
        trains: False leaves the model as it is, but for a new head.
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
    """Train in place, under a cosine schedule after a linear warm-up.

    Args:
        model: what is trained.
        batches: as many as there are steps.
        steps: their number, which the schedule has to know beforehand.
        loss: batch → a scalar.
        make_optimizer: makes one from the parameters that require gradients, after the parts have
            had their say about them.
        method: only its `parts` count here; its weights are the loss's and the batches' affair.
        seed: of what a part draws.
        warmup: share of the steps in which the learning rate rises.
    """
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
    """Return the share of the learning rate at a step: it rises in a line and falls as a cosine.

    Example:
        >>> [round(cosine(step, 4, 0.0), 2) for step in range(5)]
        [1.0, 0.85, 0.5, 0.15, 0.0]
    """
    rise = round(warmup * steps)
    if step < rise:
        return (step + 1) / rise
    progress = (step - rise) / max(steps - rise, 1)
    return 0.5 * (1 + torch.cos(torch.tensor(torch.pi * min(progress, 1.0))).item())


def passes(loader: DataLoader[Any], epochs: int) -> Iterator[Any]:
    """Yield a loader's batches, epoch after epoch; a `FlowSampler` draws anew for each."""
    for epoch in range(epochs):
        # A loader with a batch sampler of the user's own has its sampler one level deeper.
        sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]
        if isinstance(sampler, FlowSampler):
            sampler.set_epoch(epoch)
        yield from loader
