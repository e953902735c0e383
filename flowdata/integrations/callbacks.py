"""What a Trainer on the weights does when training, its epochs and its optimiser steps begin."""

from __future__ import annotations

from typing import Any

from accelerate.state import PartialState  # type: ignore[import-untyped]
from transformers import TrainerCallback

from flowdata._common.notices import is_first_rank, logger
from flowdata.sampler import FlowSampler


class LoaderCheck(TrainerCallback):  # type: ignore[misc]
    """Looks at the loader that a run begins and goes on with, whoever made it.

    `get_train_dataloader` and `_get_train_sampler` can be overridden past the mixin, and a callback
    can put another sampler in.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a loader that would train on other samples than the weights say."""
        self.trainer.check_train_loader(kwargs["train_dataloader"])

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse what a callback made of it. An epoch's first batches are read by now."""
        self.trainer.check_train_loader(kwargs["train_dataloader"])


class SamplerEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells a sampler its epoch: a Trainer that resumes on several ranks doesn't."""

    def __init__(self, sampler: FlowSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch that begins, or goes on after a checkpoint."""
        self.sampler.set_epoch(int(state.epoch or 0))


class StepAccount(TrainerCallback):  # type: ignore[misc]
    """Holds what a Trainer does in an optimiser step against what its denominator counts.

    `get_batch_samples`, `training_step` and `compute_loss` can each be overridden past the mixin.
    """

    def __init__(self) -> None:
        self._reset()

    def _reset(self) -> None:
        self._left: list[Any] = []  # of a stream that ended within a step
        self._steps = 0  # of the epoch, so far
        self._batches = self._losses = 0  # of the step; 0 batches outside of one

    def missing(self, number: int) -> int:
        """Return how many batches have to be fetched for a step of `number`."""
        return number - len(self._left)

    def open(self, batches: list[Any], number: int) -> list[Any]:
        """Return the batches of the step that begins: `number`, or none where a stream has ended.

        A Trainer makes no step at the end of an epoch whose length it doesn't know. The batches
        that are left go into the first step after it, and the denominator of that step counts them.
        """
        batches = self._left + batches
        is_whole = len(batches) >= number
        self._left = [] if is_whole else batches
        self._batches, self._losses = len(batches) if is_whole else 0, 0
        self._steps += is_whole
        return batches if is_whole else []

    def add_loss(self, num_items: Any) -> None:
        """Count a weighted loss.

        Raises:
            ValueError: it has no denominator, and its batch is but a part of the step.
        """
        self._losses += 1
        parts = self._batches * int(PartialState().num_processes)
        if num_items is None and parts > 1:
            raise ValueError(
                "compute_loss was called without num_items_in_batch, the denominator of all "
                f"{parts} batches of a step: let an overridden compute_loss or training_step pass "
                "it on (super().compute_loss(model, inputs, return_outputs, num_items_in_batch)), "
                "and divide the loss by nothing else"
            )

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a run before this one."""
        self._reset()

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Forget a step that the run broke off: a loss by hand has no part in it."""
        self._reset()

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Begin to count steps."""
        self._steps = 0

    def on_epoch_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a stream that is too short for a step: the Trainer ends there without a word.

        It goes on where it skipped the stream's other batches, which a checkpoint had trained on;
        where it skipped all of them, its place in a later pass is lost, which is warned of. An
        epoch stopped within a step would leave its gradients to the next step.
        """
        if self._batches and not control.should_training_stop:
            raise RuntimeError(
                "control.should_epoch_stop was set within an optimiser step, whose gradients would "
                "be added to the next one: set it in on_step_end, not in on_substep_end"
            )
        if self._left and not self._steps and control.should_training_stop:
            raise ValueError(
                f"the training stream ended after {len(self._left)} batches, before its first step "
                f"of gradient_accumulation_steps={args.gradient_accumulation_steps}: accumulate "
                "fewer, or repeat the stream"
            )
        is_over = control.should_training_stop or state.global_step >= state.max_steps
        if not (self._left or self._steps or is_over) and is_first_rank():
            logger.warning(
                "the checkpoint was saved after %d batches, and a pass over the training stream "
                "has no more: the Trainer skips batches within one pass alone, so that the run "
                "goes on at the stream's first sample, wherever in a later pass it stood; each "
                "sample's weight stays right. To resume where a run stood, train it on a stream "
                "that repeats itself (of datasets: stream.repeat(None))",
                state.global_step * args.gradient_accumulation_steps,
            )

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse gradients of losses without weights, or with another denominator."""
        batches, self._batches = self._batches, 0
        if not batches:
            raise RuntimeError(
                "get_batch_samples is overridden by a class that doesn't ask super(), so that the "
                "step's loss has another denominator than its weights; take the batches, and "
                "num_items_in_batch, from super().get_batch_samples()"
            )
        if self._losses < batches:
            raise RuntimeError(
                f"{batches - self._losses} of the step's {batches} batches have a loss that "
                "ignores the weights (such as outputs.loss), or none at all: compute_loss or "
                "training_step is overridden by a class that doesn't ask for it, or leaves the "
                "model in eval(), or args.gradient_accumulation_steps was changed within the run; "
                "call super().compute_loss in it, or pass loss=(outputs, batch) -> (B,) losses"
            )
