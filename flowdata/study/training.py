"""The definition of a method, and the one training loop that all methods share.

A method says how samples (or their tokens) are weighed, and which parts change the training. A part
is a context manager around the whole training: it may change the model on entering, act in every
step through `Hooks`, and change the model again on leaving.

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
    """The actions of a part in each step.

    Attributes:
        penalty: returns a term that is added to the loss.
        before_step: called after the backward pass and before the optimiser's update.
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
        weights: makes (N,) sample weights, or one weight for each target token, from the frozen
            model's scores; None weighs all alike.
        resample: whether to draw samples ∝ weight and leave the loss unweighted.
        rule: makes further weights from the losses of the model in training, see
            `flowdata.token_weights`: of a language model's tokens, or of a classifier's samples,
            each of which has the one loss of its class.
        parts: actions beside the weights; entered in order, left in reverse.
        hold: strength of an `OutputAnchor` on the drift of a task that has a meter; for other loops
            there is the part `output_anchor`.
        trains: False leaves the model as it is, except for a new head.
    """

    weights: Callable[[Scores], Tensor] | None = None
    resample: bool = False
    rule: TokenRule | None = None
    parts: tuple[Part, ...] = ()
    hold: float = 0.0
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

    A method with ``trains=False`` leaves the model as it is.

    Args:
        model: the model to train.
        batches: one for each step.
        steps: the number of batches, which the schedule has to know in advance.
        loss: batch → a scalar.
        make_optimizer: makes the optimiser from the parameters that require gradients once all
            parts are entered.
        method: of it `parts` and `trains` are used here; `loss` and `batches` have to apply its
            weights.
        seed: makes the random draws of the parts.
        warmup: share of the steps in which the learning rate rises.

    Raises:
        ValueError: the method holds outputs, and no meter has made a part of that.
    """
    if method.hold:
        raise ValueError(
            "method.hold needs a drift meter, which HeadTask has; in a loop of your own pass "
            "parts=(output_anchor(meter, strength),) instead"
        )
    if not method.trains:
        return
    model.train()
    with ExitStack() as stack:
        hooks = [stack.enter_context(part(model, steps, seed)) for part in method.parts]
        optimizer = make_optimizer([p for p in model.parameters() if p.requires_grad])
        schedule = torch.optim.lr_scheduler.LambdaLR(
            optimizer, lambda step: cosine(step, steps, warmup)
        )
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
    """Return the share of the highest learning rate at a step: a linear rise, then a cosine.

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
    """Yield a loader's batches, epoch after epoch; a `FlowSampler` draws another order in each."""
    for epoch in range(epochs):
        # The batch sampler has the sampler in every case; `loader.sampler` is another one if the
        # user has passed a batch sampler.
        sampler = loader.batch_sampler.sampler  # type: ignore[union-attr]
        if isinstance(sampler, FlowSampler):
            sampler.set_epoch(epoch)
        yield from loader
