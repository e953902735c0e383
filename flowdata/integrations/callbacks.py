"""What a Trainer on the weights does when training and its epochs begin."""

from __future__ import annotations

from typing import Any

from transformers import TrainerCallback

from flowdata.sampler import FlowSampler


class TrainingStart(TrainerCallback):  # type: ignore[misc]
    """Looks at the loader that a run begins with, whoever made it.

    `get_train_dataloader` and `_get_train_sampler` can be overridden past the mixin.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Refuse a loader that would train on other samples than the weights say."""
        self.trainer.check_train_loader(kwargs["train_dataloader"])


class SamplerEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells a sampler its epoch: a Trainer that resumes on several ranks doesn't."""

    def __init__(self, sampler: FlowSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch that begins, or goes on after a checkpoint."""
        self.sampler.set_epoch(int(state.epoch or 0))
