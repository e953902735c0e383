"""Accelerate: the batches of a prepared loader with the denominator of their optimiser step."""

from __future__ import annotations

import os
from collections.abc import Callable, Iterator
from typing import Any

from accelerate import Accelerator  # type: ignore[import-untyped]
from accelerate.data_loader import DataLoaderStateMixin  # type: ignore[import-untyped]
from torch import Tensor

from flowdata.accumulation import optimizer_steps


class PreparedBatches(DataLoaderStateMixin):  # type: ignore[misc]
    """The batches of a loader that `prepare` returned, with the `num_items` of their step.

    It is `flowdata.accumulation.AccumulatedBatches` for the usual loop of Accelerate, which stays
    as it is::

        model, optimizer, loader = accelerator.prepare(model, optimizer, loader)
        batches = PreparedBatches(accelerator, loader, lambda item: len(item[1]))
        for (batch, weights), num_items in batches:
            with accelerator.accumulate(model):
                losses = per_sample_loss(model, batch)
                accelerator.backward(flowdata.weighted_mean(losses, weights, num_items=num_items))
                optimizer.step()
                optimizer.zero_grad()

    `backward` divides by ``gradient_accumulation_steps``, which `num_items` already undoes, and the
    epoch's last step is made at its last batch, although the batches of a step are read ahead.
    Without `accumulate`, the loop decides itself when to step; `backward` stays Accelerate's.

    Samples that ``even_batches`` repeats to fill the last batches are trained on twice, as without
    this class. Save a state at the end of a step (``accelerator.sync_gradients``): within one, the
    loader stands at its end.

    On CPUs, torchrun and ``accelerate launch`` need ``Accelerator(cpu=True)`` for several processes
    (``launch --cpu`` starts but one), and Accelerate then trains under DDP, whatever it is told of
    FSDP or DeepSpeed. DeepSpeed divides by the accumulation steps of its own configuration, which
    Accelerate takes over, to the same end.

    Args:
        accelerator: the one that prepared the loader, with its ``gradient_accumulation_steps``.
        loader: what ``accelerator.prepare`` returned.
        count: batch -> its items, as in `AccumulatedBatches`.

    Raises:
        TypeError: the loader was not prepared.
        ValueError: steps may reach beyond the epoch (``sync_with_dataloader=False``), or each of
            several processes has an accelerator to itself; or, in a pass, `accumulate` does not
            stand where the batches do, or the loader's length is another on another rank.
    """

    def __init__(
        self, accelerator: Accelerator, loader: Any, count: Callable[[Any], float | Tensor]
    ) -> None:
        if not isinstance(loader, DataLoaderStateMixin):
            raise TypeError(
                f"loader must be what accelerator.prepare returned, got {type(loader).__name__}: "
                "prepare the plain loader first, and pass the result here"
            )
        if not accelerator.gradient_state.sync_with_dataloader:
            raise ValueError(
                "sync_with_dataloader=False lets a step begin in one epoch and end in the next, "
                "whose items can't be counted ahead: leave it True, so that an epoch ends a step"
            )
        ranks = int(os.environ.get("WORLD_SIZE", 1))  # torchrun's and accelerate launch's
        if ranks > 1 and accelerator.num_processes == 1 and accelerator.device.type == "cpu":
            raise ValueError(
                f"accelerator has one process, but {ranks} were launched, each of which would "
                "train alone on all samples: on CPUs make it with Accelerator(cpu=True)"
            )
        self.accelerator, self.loader, self.count = accelerator, loader, count
        self.gradient_state = accelerator.gradient_state

    def __len__(self) -> int:
        """Return the number of batches of this rank."""
        return len(self.loader)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the loader's next pass, as after a resumption."""
        self.loader.set_epoch(epoch)

    def __iter__(self) -> Iterator[tuple[Any, Tensor]]:
        """Yield each batch with its step's `num_items`, 0-d float32."""
        accelerator, steps = self.accelerator, self.accelerator.gradient_accumulation_steps
        if accelerator.step % steps:
            raise ValueError(
                f"accelerator stands at batch {accelerator.step % steps} of a step of {steps}: the "
                "last pass was left within a step. Leave a pass where accelerator.sync_gradients "
                "is True, or clear the gradients and set accelerator.step = 0"
            )
        batches_of_steps = optimizer_steps(self.loader, steps, self.count)
        try:
            for number, (step, num_items) in enumerate(batches_of_steps):
                if number == 0:
                    # Accelerate asks the loader that began last whether it is at its end. The
                    # one underneath, which began when it was read, is at its end too early.
                    self.begin()
                is_last = self.loader.end_of_dataloader or len(step) < steps
                yield from self._of_step(step, num_items / steps, is_last)
        finally:
            self.end()
            self.loader.end()  # which a pass that is left early would forget

    def _of_step(
        self, step: list[Any], num_items: Tensor, is_last: bool
    ) -> Iterator[tuple[Any, Tensor]]:
        """Yield the batches of a step, and check that `accumulate`, if used, counts with them."""
        self.remainder = self.loader.remainder
        for place, batch in enumerate(step, start=1):
            self.end_of_dataloader = is_last and place == len(step)
            before = self.accelerator.step
            yield batch, num_items
            after = 0 if self.end_of_dataloader else before + 1
            if self.accelerator.step not in (before, after):
                raise ValueError(
                    f"accelerator.step went from {before} to {self.accelerator.step} at one batch, "
                    "so that its steps are no longer those whose items were counted: enter "
                    "accelerator.accumulate once for a batch, with all models as its arguments"
                )
