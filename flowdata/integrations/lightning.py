"""Lightning: a data module whose batches bring their weights and the step's denominator."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from lightning.fabric.utilities.data import _auto_add_worker_init_fn
from lightning.pytorch import Callback, LightningDataModule, LightningModule, Trainer
from lightning.pytorch.utilities import CombinedLoader
from lightning.pytorch.utilities.model_helpers import is_overridden
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata._common.notices import logger
from flowdata._common.resumable import check_natural
from flowdata.accumulation import AccumulatedBatches
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.checks import check_loader, flow_sampler_of
from flowdata.integrations.lightning_batches import (
    Count,
    TrainerBatches,
    WeightedBatches,
    count_items_of,
)
from flowdata.integrations.lightning_drift import DriftCallback as DriftCallback
from flowdata.losses import Normalize
from flowdata.sampler import FlowSampler
from flowdata.targets.target_weights import check_normalize
from flowdata.weights import Temperature


class FlowDataModule(LightningDataModule):  # type: ignore[misc]
    """Training batches as ``(batch, weights), num_items``, or resampled ones as ``batch``.

    In `training_step`, weigh the losses and divide by `num_items`::

        (batch, weights), num_items = item
        return flowdata.weighted_mean(losses, weights, num_items=num_items)

    `num_items` is counted over the batches that the trainer puts into the optimiser step, whatever
    ``accumulate_grad_batches`` and ``limit_train_batches`` say, and over the ranks; Lightning's own
    division of the loss is already undone. Samples are shuffled, and each rank gets its share
    without duplicates; a remainder of fewer samples than ranks is left out. A checkpoint from the
    midst of an epoch goes on with the batch that comes next. ``overfit_batches`` keeps the order
    of the first epoch.

    Args:
        dataset: map-style, N samples, unweighted.
        scores_or_weights: its `Scores`, or (N,) weights.
        batch_size: samples on each rank.
        collate_fn: collator of the unweighted samples; the default one if None.
        val_dataloaders: what ``Trainer.fit(val_dataloaders=)`` takes, which Lightning refuses
            beside a data module.
        resample: draw samples ∝ weight instead; the loss is then left alone.
        temperature: as in `resolve_temperature`.
        normalize: ``"count"`` or ``"weights"``: what `num_items` counts, without a `count`.
        count: (batch, weights) -> items of one batch; by default the target tokens of a mapping
            with `input_ids` and (B, T) integer `labels`, otherwise the samples. The first label of
            each row is no target where labels repeat the `input_ids`, as in causal language models.
        accumulate_grad_batches: batches of an optimiser step under manual optimisation, where the
            trainer doesn't know; 1 by default. `training_step` has to step, by
            ``self.optimizers()``, after just as many and at the epoch's end: where
            ``(batch_idx + 1) % accumulate_grad_batches == 0 or self.trainer.is_last_batch``. To
            leave a batch out, let it call ``zero_grad()`` and ``step()``.
        seed: of the order.
        **loader_options: passed to `DataLoader`.

    Raises:
        ScoreMismatchError, TypeError, ValueError: as `FlowWeightedDataset`; an option that would
            be ignored, as that of a denominator under `resample`; when training starts, the
            trainer's batches of a step can't be known; or, before the next batch, manual
            optimisation stepped elsewhere.
    """

    def __init__(
        self,
        dataset: Any,
        scores_or_weights: Any,
        *,
        batch_size: int,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        val_dataloaders: Any = None,
        resample: bool = False,
        temperature: Temperature = "median",
        normalize: Normalize = "count",
        count: Count | None = None,
        accumulate_grad_batches: int | None = None,
        seed: int = 0,
        **loader_options: Any,
    ) -> None:
        super().__init__()
        if isinstance(dataset, FlowWeightedDataset):
            raise ValueError(
                "dataset carries weights already; pass the plain data set, and beside it its "
                "scores or weights"
            )
        check_natural("batch_size", batch_size, least=1)
        if accumulate_grad_batches is not None:
            check_natural("accumulate_grad_batches", accumulate_grad_batches, least=1)
        _check_denominator(normalize, count, accumulate_grad_batches, resample=resample)
        for name in ("sampler", "batch_sampler", "shuffle"):
            if name in loader_options:
                raise ValueError(
                    f"{name} is not for a FlowDataModule, which shuffles or, with resample=True, "
                    "draws by itself; leave it out"
                )
        self.weighted = FlowWeightedDataset(dataset, scores_or_weights, temperature=temperature)
        self.resample, self.normalize, self.count = resample, normalize, count
        self.batch_size, self.collate_fn = batch_size, collate_fn
        self.accumulate_grad_batches, self.seed = accumulate_grad_batches, seed
        self.loader_options = loader_options
        if val_dataloaders is not None:
            # Lightning looks whether the hook differs from the base class's, so that a module
            # without validation must not have one.
            self.val_dataloader = partial(_itself, val_dataloaders)

    def train_dataloader(self) -> Any:
        """Return this rank's batches.

        Raises:
            ValueError: there is no trainer, or it takes batches in a way that can't be counted.
        """
        trainer = self.trainer
        self._check_trainer(trainer)
        ranks = trainer.distributed_sampler_kwargs or {"num_replicas": 1, "rank": 0}
        options = {**ranks, "seed": self.seed, "drop_last": True}
        if self.resample:
            dataset, collate = self.weighted.dataset, self.collate_fn
            sampler = FlowSampler(self.weighted.weights, **options)
        else:
            dataset, collate = self.weighted, self.collate_fn and WeightedCollator(self.collate_fn)
            # Drawn without replacement, equal weights are a shuffle that starts at any position.
            sampler = FlowSampler(torch.ones(len(dataset)), replacement=False, **options)
        loader = DataLoader(
            dataset, self.batch_size, sampler=sampler, collate_fn=collate, **self.loader_options
        )
        _auto_add_worker_init_fn(loader, trainer.global_rank)  # what Lightning does to a DataLoader
        if self.resample:
            return TrainerBatches(loader, sampler, trainer)
        return WeightedBatches(loader, sampler, trainer, self._count, self.accumulate_grad_batches)

    def teardown(self, stage: str) -> None:
        """Warn where manual optimisation left the run's last batches without their step."""
        combined = self.trainer.fit_loop._combined_loader if self.trainer else None
        if stage != "fit" or combined is None:
            return
        for loader in combined.flattened:
            if isinstance(loader, WeightedBatches) and (message := loader.wrong_step()):
                logger.warning(message)

    def _check_trainer(self, trainer: Trainer | None) -> None:
        if trainer is None:
            raise ValueError(
                "the batches of a FlowDataModule depend on the trainer; pass it as "
                "Trainer.fit(datamodule=), or set its `trainer` first"
            )
        module = trainer.lightning_module
        if "dataloader_iter" in inspect.signature(module.training_step).parameters:
            raise ValueError(
                "training_step(dataloader_iter) fetches batches as it likes, so that a step's "
                "items can't be counted ahead; let it take a batch"
            )
        if module.automatic_optimization and self.accumulate_grad_batches is not None:
            raise ValueError(
                "accumulate_grad_batches of a FlowDataModule is for manual optimisation; "
                "otherwise the trainer's counts: Trainer(accumulate_grad_batches="
                f"{self.accumulate_grad_batches})"
            )
        if is_overridden("val_dataloader", module) and not is_overridden("val_dataloader", self):
            logger.warning(
                "Lightning asks a data module alone for its loaders, so that the module's own "
                "val_dataloader() is not used; pass FlowDataModule(val_dataloaders=)"
            )

    def _count(self, batch: Any, weights: Tensor) -> float | Tensor:
        if self.count is not None:
            return self.count(batch, weights)
        return count_items_of(batch, weights, self.normalize)


def _check_denominator(
    normalize: Normalize,
    count: Count | None,
    accumulate_grad_batches: int | None,
    *,
    resample: bool,
) -> None:
    """Refuse what would be said of a denominator to no effect."""
    check_normalize(normalize)
    said = {
        "normalize": normalize != "count",
        "count": count is not None,
        "accumulate_grad_batches": accumulate_grad_batches is not None,
    }
    names = [f"{name}=" for name, is_said in said.items() if is_said]
    if resample and names:
        raise ValueError(
            "resample=True leaves the loss alone, without num_items, so that "
            f"{' and '.join(names)} would be ignored; leave {'it' if len(names) == 1 else 'them'} "
            "out, or weigh with resample=False"
        )
    if count is not None and normalize != "count":
        raise ValueError(
            f"count= says what num_items counts, so that normalize={normalize!r} would be ignored; "
            "leave one of the two out"
        )


class FlowGuard(Callback):  # type: ignore[misc]
    """A callback for loaders of your own: it refuses to train where weights would act wrongly.

    ``Trainer(callbacks=[FlowGuard()])``. A `FlowDataModule` needs none, its loaders are right by
    construction.
    """

    def setup(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Keep the training loaders as they were made: Lightning may put other samplers in them."""
        source = trainer.fit_loop._data_source
        request = type(source).dataloader

        def record() -> Any:
            loaders = request(source)
            combined = loaders if isinstance(loaders, CombinedLoader) else CombinedLoader(loaders)
            self._loaders = list(combined.flattened)
            return loaders

        source.dataloader = record

    def teardown(self, trainer: Trainer, pl_module: LightningModule, stage: str) -> None:
        """Undo what `setup` did."""
        vars(trainer.fit_loop._data_source).pop("dataloader", None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Check the training loaders.

        Raises:
            ValueError: a `FlowSampler` draws from a `FlowWeightedDataset`, or gives its whole order
                to each of several ranks; Lightning replaced a `FlowSampler`; or
                `AccumulatedBatches` count a step's items.
        """
        num_ranks = (trainer.distributed_sampler_kwargs or {}).get("num_replicas", 1)
        combined = trainer.fit_loop._combined_loader
        for original, loader in zip(self._loaders, combined.flattened, strict=True):
            if isinstance(loader, TrainerBatches):
                continue
            check_loader(loader, num_ranks=num_ranks)
            if flow_sampler_of(original) is not None and flow_sampler_of(loader) is None:
                raise ValueError(
                    "Lightning put its own sampler in the place of the FlowSampler, so that the "
                    "weights would not act: under overfit_batches it does so always, on several "
                    "ranks to one inside a batch_sampler. Use FlowDataModule(resample=True), or "
                    "on several ranks Trainer(use_distributed_sampler=False)"
                )
            if isinstance(loader, AccumulatedBatches):
                raise ValueError(
                    "AccumulatedBatches doesn't know which batches the trainer puts into a step, "
                    "nor that it divides the loss by them; use FlowDataModule"
                )


def _itself(value: Any) -> Any:
    return value
