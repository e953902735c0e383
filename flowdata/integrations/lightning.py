"""Lightning: a data module whose batches bring their weights and the step's denominator."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.callbacks import GradientAccumulationScheduler
from torch import Tensor
from torch.utils.data import DataLoader
from torch.utils.data.distributed import DistributedSampler

from flowdata.accumulation import AccumulatedBatches
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.checks import check_loader
from flowdata.losses import Normalize, count_items
from flowdata.sampler import FlowSampler
from flowdata.weights import Temperature

Count = Callable[[Any, Tensor], "float | Tensor"]


class FlowDataModule(LightningDataModule):  # type: ignore[misc]
    """Training batches as ``(batch, weights), num_items``, or resampled ones as ``batch``.

    In `training_step`, weigh the losses and divide by `num_items`::

        (batch, weights), num_items = item
        return flowdata.weighted_mean(losses, weights, num_items=num_items)

    `num_items` is counted over the accumulated batches and the ranks, with Lightning's own
    division by ``accumulate_grad_batches`` already undone. Samples are shuffled, and each rank
    gets its share without duplicates; a remainder of fewer samples than ranks is left out.

    Args:
        dataset: map-style, N samples, unweighted.
        scores_or_weights: its `Scores`, or (N,) weights.
        batch_size: samples on each rank.
        collate_fn: collator of the unweighted samples; the default one if None.
        resample: draw samples ∝ weight instead; the loss is then left alone.
        temperature: as in `resolve_temperature`.
        normalize: ``"count"`` or ``"weights"``: what `num_items` counts.
        count: (batch, weights) -> items of one batch; by default the target tokens of a mapping
            with `input_ids` and (B, T) `labels`, otherwise the samples.
        seed: of the order.
        **loader_options: passed to `DataLoader`.

    Raises:
        ScoreMismatchError, TypeError, ValueError: as `FlowWeightedDataset`.
    """

    def __init__(
        self,
        dataset: Any,
        scores_or_weights: Any,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        resample: bool = False,
        temperature: Temperature = "median",
        normalize: Normalize = "count",
        count: Count | None = None,
        seed: int = 0,
        **loader_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(dataset, FlowWeightedDataset):
            raise ValueError(
                "dataset carries weights already; pass the plain data set, and beside it its "
                "scores or weights"
            )
        self.weighted = FlowWeightedDataset(dataset, scores_or_weights, temperature=temperature)
        self.resample, self.normalize, self.count = resample, normalize, count
        self.seed, self.collate_fn = seed, collate_fn
        self.loader_options = {"batch_size": batch_size, **loader_options}

    def train_dataloader(self) -> Any:
        """Return this rank's loader."""
        # Both samplers are made for this rank: Lightning shards a DataLoader by itself, but not
        # `AccumulatedBatches`, and leaves a DistributedSampler, which a FlowSampler is, as it is.
        options = {"num_replicas": self.trainer.world_size, "rank": self.trainer.global_rank}
        options |= {"seed": self.seed, "drop_last": True}
        if self.resample:
            return DataLoader(
                self.weighted.dataset,
                sampler=FlowSampler(self.weighted.weights, **options),
                collate_fn=self.collate_fn,
                **self.loader_options,
            )
        loader = DataLoader(
            self.weighted,
            sampler=DistributedSampler(self.weighted, **options),
            collate_fn=self.collate_fn and WeightedCollator(self.collate_fn),
            **self.loader_options,
        )
        # Lightning divides each loss by the number of accumulated batches. Each batch is counted
        # by that factor too small, so that the two divisions cancel.
        steps = _batches_per_step(self.trainer)
        return AccumulatedBatches(loader, steps, lambda item: self._count(*item) / steps)

    def _count(self, batch: Any, weights: Tensor) -> float | Tensor:
        if self.count is not None:
            return self.count(batch, weights)
        if isinstance(batch, Mapping) and "input_ids" in batch and batch["labels"].dim() == 2:
            return count_items(batch["labels"], weights, normalize=self.normalize)
        return weights.sum() if self.normalize == "weights" else len(weights)


class FlowGuard(Callback):  # type: ignore[misc]
    """A callback for loaders of your own: it refuses to train where weights would act twice.

    ``Trainer(callbacks=[FlowGuard()])``. A `FlowDataModule` needs none, its loaders are right by
    construction.
    """

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the training loaders.

        Raises:
            ValueError: a `FlowSampler` draws from a `FlowWeightedDataset`, or gives its whole order
                to each of several ranks.
        """
        ranks = getattr(trainer.strategy, "distributed_sampler_kwargs", None) or {}
        combined = trainer.fit_loop._combined_loader
        for loader in combined.flattened if combined is not None else ():
            check_loader(loader, num_ranks=ranks.get("num_replicas", 1))


def _batches_per_step(trainer: Trainer) -> int:
    """Return the number of batches in an optimiser step; it must not change during training."""
    for callback in trainer.callbacks:
        if isinstance(callback, GradientAccumulationScheduler) and len(callback.scheduling) > 1:
            raise ValueError(
                f"accumulate_grad_batches changes during training ({callback.scheduling}), so the "
                "items of a step can't be counted ahead; keep it constant"
            )
    return int(trainer.accumulate_grad_batches)
