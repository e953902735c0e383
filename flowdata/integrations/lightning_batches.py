"""Lightning: the loaders of `FlowDataModule`, which follow the trainer's count of batches."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from itertools import chain, islice, repeat
from typing import Any, NamedTuple

import torch
from lightning.fabric.utilities.data import sized_len
from lightning.pytorch import Trainer
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata._common.resumable import check_state
from flowdata.accumulation import mean_items
from flowdata.integrations.trainer_loss import RunLoss, count_batch
from flowdata.losses import Normalize
from flowdata.sampler import FlowSampler
from flowdata.targets.labels import IGNORE_INDEX

Count = Callable[[Any, Tensor], "float | Tensor"]


def count_items_of(batch: Any, weights: Tensor, normalize: Normalize) -> float | Tensor:
    """Return how many items a batch has, or the sum of their weights.

    The items of a mapping with `input_ids` and (B, T) integer `labels` are target tokens. Labels
    that repeat the `input_ids` are those of a causal language model, which predicts none of the
    first; of any others, as in seq2seq, each stands in its own place. Else samples are the items.

    Args:
        batch: as the collator made it.
        weights: (B,), or (B, T) for each label.
        normalize: ``"count"`` or ``"weights"``.

    Raises:
        ValueError: integer labels of another shape than `input_ids` that are all 0 or 1, and may be
            target tokens or answers to several questions.
    """
    labels: Any = batch.get("labels") if isinstance(batch, Mapping) else None
    is_of_tokens = isinstance(labels, Tensor) and labels.dim() == 2 and "input_ids" in batch
    if not is_of_tokens or labels.is_floating_point() or labels.dtype == torch.bool:
        return weights.sum() if normalize == "weights" else len(weights)
    ids = batch["input_ids"]
    is_alike = isinstance(ids, Tensor) and ids.shape == labels.shape
    # Tokens have larger numbers, too, and 0 is mostly that of padding, which is no target.
    if not is_alike and labels.shape[1] > 1 and labels.min() == 0 and labels.max() <= 1:
        raise ValueError(
            f"integer labels of shape {tuple(labels.shape)}, all 0 or 1 and not one for each of "
            "the input_ids, may be a yes or no for each class or target tokens, so that their "
            "items can't be counted; give a yes or no as a float, or pass FlowDataModule(count=), "
            "(batch, weights) -> items"
        )
    is_causal = is_alike and bool(((labels == ids) | (labels == IGNORE_INDEX)).all())
    run = RunLoss("causal_lm" if is_causal else "seq2seq_lm")
    return count_batch(run, {"labels": labels}, weights, normalize=normalize)


class TrainerBatches:
    """A loader's batches from where the trainer stands in its epoch.

    The order is a pure function of epoch and position, and the trainer's own progress, which its
    checkpoints hold, tells both. This is no DataLoader, so that Lightning leaves its sampler alone.
    """

    def __init__(self, loader: DataLoader[Any], sampler: FlowSampler, trainer: Trainer) -> None:
        self.loader, self.sampler, self.trainer = loader, sampler, trainer
        self.total_batch_size = loader.batch_size * sampler.num_replicas  # type: ignore[operator]

    def __len__(self) -> int:
        """Return the number of batches in an epoch."""
        return len(self.loader)

    def __iter__(self) -> Iterator[Any]:
        """Yield the epoch's remaining batches."""
        # The generator looks where the trainer stands when the first batch is asked for: Lightning
        # makes it before a checkpoint's progress has been brought into order.
        place = self._ready()
        yield from self._pass(place % len(self) if self._starts_over() else place)

    def state_dict(self) -> dict[str, Any]:
        """Return what the order depends on."""
        return {"sampler": self.sampler.state_dict(0), "total_batch_size": self.total_batch_size}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Check that a checkpoint's batches are those of this loader.

        Raises:
            TypeError, ValueError: no state of such a loader, or one of another size of batches,
                other weights or another seed.
        """
        check_state(
            state_dict,
            {"total_batch_size": self.total_batch_size},
            maker="FlowDataModule's loader",
            what="loader",
            remedy="Keep batch_size × ranks, or start from a checkpoint of an epoch's end",
        )
        self.sampler.load_state_dict(state_dict["sampler"])

    def _ready(self) -> int:
        """The number of batches that the trainer has taken in this epoch."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.current.ready)

    def _starts_over(self) -> bool:
        """Whether the loader begins again within an epoch, where another has more batches."""
        mode = self.trainer.fit_loop._combined_loader._mode
        return bool(mode == "max_size_cycle" and len(self))

    def _pass(self, place: int) -> Iterator[Any]:
        """Yield the batches from `place` on."""
        # Whoever overfits wants the same batches in each epoch.
        progress = self.trainer.fit_loop.epoch_progress
        epoch = 0 if self.trainer.overfit_batches else progress.current.processed
        position = min(place * self.total_batch_size, self.sampler.num_samples)
        state = self.sampler.state_dict(0)
        self.sampler.load_state_dict({**state, "epoch": epoch, "position": position})
        yield from self.loader


class WeightedBatches(TrainerBatches):
    """Batches with weights and the denominator of the trainer's optimiser step.

    Lightning steps after every `accumulate_grad_batches` batches of an epoch and after its last
    one. The trainer is asked anew at each step: a scheduler may have changed the number.

    Args:
        loader: of this rank's samples.
        sampler: the loader's.
        trainer: that takes the batches.
        count: (batch, weights) -> items of one batch.
        manual: batches of a step under manual optimisation, if the user said so.
    """

    def __init__(
        self,
        loader: DataLoader[Any],
        sampler: FlowSampler,
        trainer: Trainer,
        count: Count,
        manual: int | None,
    ) -> None:
        super().__init__(loader, sampler, trainer)
        self.count, self.manual = count, manual
        self._held: _Held | None = None

    def __iter__(self) -> Iterator[tuple[tuple[Any, Tensor], Tensor]]:
        """Yield the epoch's remaining batches as ``(batch, weights), num_items``."""
        self._check_manual()  # Lightning doesn't come back for more after an epoch's last batch
        place = self._ready()
        starts = chain([place % len(self)], repeat(0)) if self._starts_over() else [place]
        batches = chain.from_iterable(map(self._pass, starts))
        while step := list(islice(batches, size := self._batches_of_step(place))):
            # Lightning divides each loss by this; a denominator that is as much too small undoes it
            divisor = self.trainer.accumulate_grad_batches
            num_items = mean_items(self.count(*item) for item in step) / divisor
            end, num_steps = place + size - 1, self.trainer.global_step
            for batch, weights in step:
                self._check_place(place, divisor)
                if not self.trainer.lightning_module.automatic_optimization:
                    self._held = _Held(
                        place, place == end, num_steps, self._started(), self._validated()
                    )
                yield (
                    (batch, weights.as_subclass(_Exact)),
                    num_items.as_subclass(_Exact),
                )
                self._check_manual()
                place += 1

    def wrong_step(self) -> str | None:
        """Return how manual optimisation steps elsewhere than was counted, by the last batch."""
        held, self._held = self._held, None
        if held is None or self._started() == held.started:
            return None  # such as a batch that on_train_batch_start skipped
        has_stepped = self.trainer.global_step > held.num_steps
        if has_stepped != held.is_last:
            return self._wrong_step_at(held.place, has_stepped)
        keeps = is_overridden("on_validation_model_zero_grad", self.trainer.lightning_module)
        if held.is_last or keeps or self._validated() == held.validated:
            return None
        # Lightning knows of no windows under manual optimisation, so that it takes none for open.
        return (
            f"validation after batch {held.place} of the epoch made Lightning clear the gradients "
            f"within a window of {self.manual} batches; give a multiple of {self.manual} as "
            "Trainer(val_check_interval=), or override on_validation_model_zero_grad to do nothing"
        )

    def _wrong_step_at(self, place: int, has_stepped: bool) -> str:
        """The sentence about a step, or a missing one, after the batch at `place`."""
        size, windows = self.manual or 1, "each batch alone: step on every one"
        if size > 1:
            windows = (
                f"windows of {size} batches, and the epoch's last one: step where `(batch_idx + 1) "
                f"% {size} == 0 or self.trainer.is_last_batch`"
            )
        return (
            f"your training_step made {'an' if has_stepped else 'no'} optimiser step after batch "
            f"{place} of the epoch; num_items counts {windows}, with self.optimizers(), or say how "
            "many batches a step of yours has: FlowDataModule("
            f"{'another ' if self.manual else ''}accumulate_grad_batches=)"
        )

    def _batches_of_step(self, place: int) -> int:
        """The number of batches that go into the step which begins after `place` batches."""
        trainer, total = self.trainer, self.trainer.num_training_batches
        size = self.manual or trainer.accumulate_grad_batches
        loaders = trainer.fit_loop._combined_loader
        has_end = loaders._mode != "min_size" or all(
            sized_len(loader) is not None for loader in loaders.flattened
        )
        if total == float("inf") or (size > 1 and not has_end):
            raise ValueError(
                "a loader beside that of the FlowDataModule has no length, so that the number of "
                "batches in an epoch's last step is unknown; say Trainer(limit_train_batches=) as "
                "an int, and combine the loaders by 'max_size_cycle' or 'max_size'"
            )
        if size > 1 and trainer.strategy.handles_gradient_accumulation:
            raise ValueError(
                f"{type(trainer.strategy).__name__} accumulates gradients by itself, across the "
                "end of an epoch, so that a step's items can't be counted; use "
                "accumulate_grad_batches=1, or another strategy"
            )
        return int(min(size - place % size, total - place))

    def _check_place(self, place: int, divisor: int) -> None:
        """Check that the trainer takes the batches of a step as they were counted."""
        if self._ready() != place or self.trainer.accumulate_grad_batches != divisor:
            raise ValueError(
                f"batch {place} of the epoch was counted for a step of "
                f"accumulate_grad_batches={divisor}; the trainer has taken {self._ready()} batches "
                f"so far and accumulates {self.trainer.accumulate_grad_batches}. Change it between "
                "epochs alone, and give every loader a length, so that none is fetched ahead"
            )

    def _check_manual(self) -> None:
        if message := self.wrong_step():
            raise ValueError(message)

    def _started(self) -> int:
        """The number of batches that the trainer has ever put into training_step."""
        return int(self.trainer.fit_loop.epoch_loop.batch_progress.total.started)

    def _validated(self) -> int:
        """The number of batches that the trainer has validated on in this epoch."""
        return int(self.trainer.fit_loop.epoch_loop.val_loop.batch_progress.total.ready)


class _Held(NamedTuple):
    """The batch that the trainer has, under manual optimisation."""

    place: int
    is_last: bool  # of those that its denominator counts
    num_steps: int  # the trainer's optimiser steps before the first of them
    started: int  # batches that training_step had ever begun when this one was given
    validated: int  # batches of validation in this epoch until then


class _Exact(Tensor):
    """A tensor that stays float32 where Lightning converts a batch.

    ``precision="bf16-true"`` turns every floating tensor of a batch to bfloat16, in which a count
    of 1,001 is 1,000.
    """

    __torch_function__ = torch._C._disabled_torch_function_impl  # type: ignore[assignment]

    def to(self, *args: Any, **options: Any) -> Tensor:
        """Move to a device as a plain tensor; a dtype is not taken."""
        if args and isinstance(args[0], torch.dtype):
            return self
        return super().to(*args, **options).as_subclass(Tensor)
