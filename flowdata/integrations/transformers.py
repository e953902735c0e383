"""Hugging Face Trainer: a mixin that makes any Trainer train on the weights, exactly."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from flowdata.accumulation import mean_over_ranks
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset, Layout
from flowdata.integrations.checks import TWICE, carries_weights, check_loader, find_sampler
from flowdata.losses import Normalize, causal_lm_loss, count_items, weighted_mean
from flowdata.models.calling import innermost
from flowdata.sampler import FlowSampler
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.targets.prediction_losses import (
    binary_cross_entropy,
    cross_entropy,
    squared_error,
)
from flowdata.targets.predictions import classes_come_last, logits_of
from flowdata.targets.target_losses import TargetLosses
from flowdata.targets.which_loss import loss_of
from flowdata.token_weights import TokenRule
from flowdata.weights import Temperature

if TYPE_CHECKING:  # the mixin's methods are a Trainer's, and it goes before any class of that kind
    from transformers import Trainer as _Base
else:
    _Base = object

SampleLoss = Callable[[Any, Any], Tensor]


class FlowTrainerMixin(_Base):  # type: ignore[misc]
    """Put before any `Trainer` class, it trains on Σ weight · loss, or on resampled batches.

    ``class MyFlowTrainer(FlowTrainerMixin, MyTrainer): ...``; `FlowTrainer` is that for
    `Trainer`. The denominator is counted over the accumulated batches and the ranks of each
    optimiser step, so gradients are those of the whole step however it is cut. Evaluation is
    left as it was: unweighted, with the model's own loss.

    Args:
        *args: the Trainer's own.
        train_dataset: the data set, or one whose samples carry their weight already: a
            `FlowWeightedDataset`, a column `weight_key` (`Scores.to_column`), 0-d per sample or
            one for each token.
        scores: `Scores`, or (N,) weights, of `train_dataset`; None if it carries them.
        temperature: as in `resolve_temperature`.
        resample: draw samples ∝ weight (`FlowSampler`) and leave the loss alone.
        normalize: ``"count"`` or ``"weights"``, as in `causal_lm_loss`.
        token_rule: for causal language models, as in `causal_lm_loss`; not with ``"weights"``.
        sample_loss: (outputs, labels) -> (B,) for models whose loss is not the cross-entropy,
            binary cross-entropy or squared error of `logits` and `labels`.
        weight_key: the weight's name in samples and batches.
        **kwargs: the Trainer's own.

    Raises:
        ScoreMismatchError: `scores` are of another data set.
        ValueError: weights missing or given twice, an option under which they would be dropped
            (`label_smoothing_factor`, `compute_loss_func`), or a sampler that would shard twice.
    """

    data_collator: Any
    _signature_columns: Any

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        scores: Any = None,
        temperature: Temperature = "median",
        resample: bool = False,
        normalize: Normalize = "count",
        token_rule: TokenRule | None = None,
        sample_loss: SampleLoss | None = None,
        weight_key: str = "weight",
        **kwargs: Any,
    ) -> None:
        carried = _carries(train_dataset, weight_key, unknown=scores is None)
        if carried and (scores is not None or resample):
            raise ValueError(
                f"train_dataset carries weights ({weight_key!r}) already: pass it without scores "
                "and resample, or pass the plain data set"
            )
        if resample and scores is None:
            raise ValueError("resample=True needs scores=, the scores or weights to draw by")
        if train_dataset is not None and not (carried or scores is not None or token_rule):
            raise ValueError(
                f"train_dataset has no {weight_key!r} and scores is None, so training would be "
                "unweighted: pass scores=, or a FlowWeightedDataset, or a data set with a column "
                f"{weight_key!r} (Scores.to_column)"
            )
        if token_rule is not None and normalize == "weights":
            raise ValueError(
                "token_rule with normalize='weights' would divide by weights that are not known "
                "before the whole step has run; use normalize='count'"
            )
        self.weight_key, self.normalize, self.token_rule = weight_key, normalize, token_rule
        self.sample_loss = sample_loss
        self._weighs = not resample and (scores is not None or carried)
        self._flow = self._weighs or token_rule is not None
        self._flow_sampler: FlowSampler | None = None
        plain, weights = train_dataset, scores
        if isinstance(train_dataset, FlowWeightedDataset):
            plain, weights = train_dataset.dataset, train_dataset.weights
        if weights is not None and not resample:
            train_dataset = self._with_weights(plain, weights, temperature)
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        if resample:
            checked = FlowWeightedDataset(train_dataset, scores, temperature=temperature)
            seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
            self._flow_sampler = FlowSampler(checked.weights, num_replicas=1, rank=0, seed=seed)
            self.add_callback(SamplerEpoch(self._flow_sampler))
        if self._flow:
            self._refuse_what_drops_the_weights()
            self.loss_is_scaled_for_ga = True
            self.data_collator = _BatchCollator(self.data_collator, weight_key)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(FlowTrainerMixin):
            raise TypeError(
                f"{cls.__name__}: put FlowTrainerMixin before the Trainer, "
                "class X(FlowTrainerMixin, MyTrainer), or it never comes into play"
            )

    def _with_weights(self, dataset: Any, scores: Any, temperature: Temperature) -> Any:
        layout: Layout = "dict" if isinstance(dataset[0], Mapping) else "pair"
        return FlowWeightedDataset(
            dataset, scores, temperature=temperature, layout=layout, key=self.weight_key
        )

    def _refuse_what_drops_the_weights(self) -> None:
        arguments: Any = self.args
        if arguments.label_smoothing_factor:
            raise ValueError(
                "label_smoothing_factor computes a loss of its own that ignores the weights; set "
                "it to 0, or pass sample_loss= with the smoothing in it"
            )
        if self.compute_loss_func is not None:
            raise ValueError(
                "compute_loss_func never sees the weights; pass sample_loss=(outputs, labels) -> "
                "(B,) losses instead"
            )
        if arguments.n_gpu > 1:
            raise ValueError(
                "nn.DataParallel splits batches after their weights are counted; launch one "
                "process for each GPU (torchrun, accelerate launch)"
            )
        parallelism = getattr(self.accelerator, "parallelism_config", None)
        if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
            raise ValueError(
                "context and sequence parallelism cut sequences after their weights are laid "
                "along them; use data parallelism (DDP, FSDP)"
            )
        if not hasattr(Trainer, "loss_is_scaled_for_ga"):
            raise ImportError("this transformers divides accumulated losses; install 5.23 or newer")

    # What the Trainer asks of its data

    def _set_signature_columns_if_needed(self) -> None:
        super()._set_signature_columns_if_needed()
        if self._weighs and self.weight_key not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.weight_key]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._flow_sampler is not None:
            return self._flow_sampler
        return super()._get_train_sampler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader, unless weights would act twice or be sharded twice."""
        loader = super().get_train_dataloader()
        sampler = find_sampler(loader)
        if sampler is not None and self._weighs:
            raise ValueError(TWICE)
        if sampler is not None and sampler.num_replicas > 1:
            raise ValueError(
                "the Trainer shards a sampler's order over the ranks itself, so a rank-aware "
                "FlowSampler would be sharded twice; make it with num_replicas=1, rank=0"
            )
        check_loader(loader)
        return loader

    # What the Trainer asks of its loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of an optimiser step and the denominator of its loss."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._flow and batches:
            counts = [self._count(batch).to(device, torch.float32) for batch in batches]
            items = mean_over_ranks(torch.stack(counts).sum())
        return batches, items

    def _count(self, batch: Mapping[str, Any]) -> Tensor:
        """The denominator of one batch, in the unit that `normalize` names."""
        labels, weights = self._labels(batch), self._weights(batch)
        task = "" if self.sample_loss else self._task(batch)
        if task == "causal_lm":
            return count_items(labels, weights, normalize=self.normalize)
        if self.sample_loss or (task == "cross_entropy" and labels.is_floating_point()):
            targets = torch.ones(len(labels), device=labels.device)
        elif task == "mse":
            targets = torch.full((len(labels),), labels[0].numel(), device=labels.device)
        else:
            targets = (labels != IGNORE_INDEX).reshape(len(labels), -1).sum(1)
        if self.normalize == "weights" and weights is not None:
            targets = targets * weights
        return targets.sum()

    def _weights(self, batch: Mapping[str, Any]) -> Tensor | None:
        weights: Tensor | None = batch.get(self.weight_key)
        if weights is None and self._weighs:
            raise ValueError(
                f"a training batch has no {self.weight_key!r}: the data set or the collator "
                "dropped it; keep the column in the data set's format and don't replace "
                "trainer.data_collator after construction"
            )
        return weights

    def _labels(self, batch: Mapping[str, Any]) -> Tensor:
        labels = batch.get("labels")
        if not isinstance(labels, Tensor):
            raise ValueError(
                f"a batch has no tensor 'labels' (it has {', '.join(map(repr, batch))}), so its "
                "items can't be counted; name the targets 'labels' in the data set or the collator"
            )
        return labels

    def _task(self, batch: Mapping[str, Any]) -> str:
        """What the loss is; a batch is asked last, as another one might answer differently."""
        return loss_of(self.model, batch)

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted loss in training and the Trainer's own in evaluation."""
        if not (self._flow and self.model.training):
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._loss_is_flow = True
        weights = self._weights(inputs)
        plain = {key: value for key, value in inputs.items() if key != self.weight_key}
        loss, outputs = self._weighted_loss(model, plain, weights, num_items_in_batch)
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], weights: Any, num_items: Any
    ) -> tuple[Tensor, Any]:
        options: Any = {"normalize": self.normalize, "num_items": num_items}
        labels = self._labels(inputs)
        task = "" if self.sample_loss else self._task(inputs)
        if self.token_rule is not None and task != "causal_lm":
            raise ValueError(f"token_rule is for causal language models, not for loss {task!r}")
        # Without labels a model spares itself a loss that nobody asked for; an encoder-decoder
        # makes its decoder's inputs from them.
        keeps_labels = self.sample_loss or task == "seq2seq_lm"
        outputs = model(**{k: v for k, v in inputs.items() if keeps_labels or k != "labels"})
        if self.sample_loss is not None:
            loss = weighted_mean(self.sample_loss(outputs, labels), weights, **options)
        elif task == "causal_lm":
            logits = logits_of(outputs)
            loss = causal_lm_loss(logits, labels, weights, token_rule=self.token_rule, **options)
        else:
            made = self._target_losses(task, logits_of(outputs).float(), inputs)
            repeats = made.counts.to(weights.device)
            loss = weighted_mean(made.values, weights.repeat_interleave(repeats), **options)
        return loss + self._router_loss(outputs), outputs

    def _target_losses(self, task: str, logits: Tensor, inputs: Mapping[str, Any]) -> TargetLosses:
        labels = inputs["labels"]
        if task == "binary_cross_entropy":
            return binary_cross_entropy(logits, labels)
        if task == "mse":
            return squared_error(logits, labels)
        last = task != "cross_entropy" or classes_come_last(self.model, inputs, labels)
        return cross_entropy(logits, labels, classes_last=last)

    def _router_loss(self, outputs: Any) -> Tensor | float:
        """A mixture of experts' balancing loss, which its model adds to the loss we replace."""
        auxiliary = getattr(outputs, "aux_loss", None)
        if auxiliary is None:
            return 0.0
        config = innermost(self.model).config.get_text_config()
        steps: int = self.current_gradient_accumulation_steps
        scaled: Tensor = config.router_aux_loss_coef * auxiliary / steps
        return scaled

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's step and refuse a loss that was made without the weights."""
        self._loss_is_flow = False
        loss = super().training_step(*args, **kwargs)
        if self._flow and not self._loss_is_flow:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss made a loss that ignores the weights (such as "
                "outputs.loss); call super().compute_loss in it, or pass sample_loss="
            )
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation step without weights, if the data has any."""
        plain = {key: value for key, value in inputs.items() if key != self.weight_key}
        return super().prediction_step(model, plain, *args, **kwargs)


class FlowTrainer(FlowTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on Σ weight · loss; see `FlowTrainerMixin` for its arguments.

    ``FlowTrainer(model, args, train_dataset=dataset, scores=scores).train()``
    """


def check_trainer(trainer: Any, weight_key: str = "weight") -> None:
    """Refuse a Trainer that would drop the weights of its training data, or count them twice.

    Raises:
        ValueError: the data carries weights and the Trainer doesn't use them.
    """
    if isinstance(trainer, FlowTrainerMixin):
        trainer.get_train_dataloader()
    elif carries_weights(trainer.train_dataset, weight_key):
        raise ValueError(
            f"{type(trainer).__name__} ignores the weights of its train_dataset: its columns are "
            "dropped before collation, or passed to a model that takes no notice of them. Use "
            f"class X(FlowTrainerMixin, {type(trainer).__name__}), or FlowTrainer"
        )


class SamplerEpoch(TrainerCallback):  # type: ignore[misc]
    """Tells a sampler its epoch: a Trainer that resumes on several ranks doesn't."""

    def __init__(self, sampler: FlowSampler) -> None:
        self.sampler = sampler

    def on_epoch_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        """Set the epoch that begins, or goes on after a checkpoint."""
        self.sampler.set_epoch(int(state.epoch or 0))


class _BatchCollator(WeightedCollator):
    """A collator for the Trainer, whose batches are always mappings."""

    def __call__(self, samples: Sequence[Any]) -> Any:
        batch = super().__call__(samples)
        if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], Mapping):
            return {**batch[0], self.key: batch[1]}
        return batch


def _carries(dataset: Any, key: str, *, unknown: bool) -> bool:
    """Whether a data set's samples have weights; a stream is not consumed to find out."""
    if dataset is None or carries_weights(dataset, key):
        return dataset is not None
    if not (hasattr(dataset, "__getitem__") and hasattr(dataset, "__len__")):
        return unknown
    first = dataset[0] if len(dataset) else None
    return isinstance(first, Mapping) and key in first
