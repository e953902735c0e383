"""Hugging Face Trainer: a mixin that makes any Trainer train on the weights, exactly."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor
from transformers import Trainer, TrainerCallback

from flowdata.accumulation import mean_over_ranks
from flowdata.collator import WeightedCollator
from flowdata.dataset import FlowWeightedDataset, Layout
from flowdata.integrations.checks import carries_weights, check_loader, flow_sampler_of
from flowdata.integrations.other_trainers import adopt_order, check_own_loss, has_own_loss
from flowdata.integrations.own_scores import (
    check_auto,
    feed_of,
    score_batches,
    weights_of_targets,
)
from flowdata.integrations.prepared import add_weights, check_not_a_stream, take_weights
from flowdata.integrations.trainer_checks import check_arguments, check_data, check_token_rule
from flowdata.integrations.trainer_loss import (
    SampleLoss,
    count_batch,
    router_loss,
    weighted_loss,
)
from flowdata.losses import Normalize
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.targets.which_loss import loss_of
from flowdata.token_weights import TokenRule
from flowdata.weights import Temperature

if TYPE_CHECKING:
    # The mixin calls methods of a Trainer, so a type checker takes it for one. At run time it has
    # no base: it then fits before any class of the Trainer's kind.
    from transformers import Trainer as _Base
else:
    _Base = object


class FlowTrainerMixin(_Base):  # type: ignore[misc]
    """Put before any `Trainer` class, it trains on Σ weight · loss, or on resampled batches.

    ``class MyFlowTrainer(FlowTrainerMixin, MyTrainer): ...``; `FlowTrainer` is that for
    `Trainer`. The denominator is counted over the accumulated batches and the ranks of each
    optimiser step, so gradients are those of the whole step however it is cut. Evaluation is
    left as it was: unweighted, with the model's own loss.

    Args:
        *args: the Trainer's own.
        train_dataset: the data set, or one whose samples carry their weight already: a
            `FlowWeightedDataset`, or samples with a `weight_key` (`Scores.to_column` adds it to a
            Hugging Face data set), 0-d per sample or one for each token.
        scores: `Scores`, or (N,) weights, of `train_dataset`; None if it carries them. ``"auto"``
            scores, before training, what the Trainer itself will feed: its tokens, its columns, its
            collator, one sample at a time (kept as `trainer.scores`).
        store: the folder in which ``scores="auto"`` keeps its losses; it goes on there, or finds
            them. None scores anew each time.
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
        ValueError: the weights are missing or passed twice; an option would drop them
            (`label_smoothing_factor`, `compute_loss_func`); or a sampler would shard twice.
    """

    data_collator: Any
    _signature_columns: Any
    _flow_sampler: FlowSampler | None
    train_dataset: Any

    def __init__(
        self,
        *args: Any,
        train_dataset: Any = None,
        scores: Any = None,
        store: str | Path | None = None,
        temperature: Temperature = "median",
        resample: bool = False,
        normalize: Normalize = "count",
        token_rule: TokenRule | None = None,
        sample_loss: SampleLoss | None = None,
        weight_key: str = "weight",
        **kwargs: Any,
    ) -> None:
        carried = carries_weights(train_dataset, weight_key, stream_does=scores is None)
        check_data(
            train_dataset, scores, weight_key, carried=carried, resample=resample, rule=token_rule
        )
        check_token_rule(token_rule, normalize, sample_loss)
        check_auto(scores, store, own_loss=resample and has_own_loss(type(self), FlowTrainerMixin))
        is_auto = isinstance(scores, str)
        self.weight_key, self.normalize, self.token_rule = weight_key, normalize, token_rule
        self.sample_loss = sample_loss
        self._batches_have_weights = not resample and (scores is not None or carried)
        self._replaces_loss = self._batches_have_weights or token_rule is not None
        self._resamples, self._flow_sampler = resample, None
        self.scores = None if isinstance(scores, str) else scores
        if self._replaces_loss:
            check_own_loss(type(self), FlowTrainerMixin, sample_loss=sample_loss, auto=is_auto)
        plain: Any = train_dataset
        weights: Any = self.scores
        if isinstance(train_dataset, FlowWeightedDataset):
            # It is taken apart and made again, in the layout that a Trainer's collator can read.
            plain, weights = train_dataset.dataset, train_dataset.weights
        if weights is not None and resample:
            check_not_a_stream(plain, "resample=True")
            weights = FlowWeightedDataset(plain, weights, temperature=temperature).weights
            train_dataset = add_weights(plain, weights, weight_key)
        elif weights is not None:
            train_dataset = self._with_weights(plain, weights, temperature)
        self._given_data = train_dataset
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self._given_data = None
        if is_auto:
            self.scores = self._score(store)
            weights = weights_of_targets(self.scores, temperature)
            if not resample:
                self._weigh_prepared(weights)
        elif resample:
            self.train_dataset, weights = take_weights(
                self.train_dataset, train_dataset, weights, weight_key
            )
        if resample:
            self._draw_by(weights)
        if self._replaces_loss:
            check_arguments(self)
            # The loss is divided by the items of the whole step; without this word the Trainer
            # might divide it by the number of accumulated batches once more.
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
        """Return the data set with a weight in each sample."""
        layout: Layout = "dict" if isinstance(dataset[0], Mapping) else "pair"
        return FlowWeightedDataset(
            dataset, scores, temperature=temperature, layout=layout, key=self.weight_key
        )

    def _score(self, store: str | Path | None) -> Scores:
        """Return the scores of the data set that the Trainer has made ready."""
        return score_batches(self, *feed_of(self), store)

    def _weigh_prepared(self, weights: Tensor) -> None:
        """Give weights to the data set that the Trainer has made ready."""
        self.train_dataset = self._with_weights(self.train_dataset, weights, "median")

    def _draw_by(self, weights: Tensor) -> None:
        """Make the sampler that draws from the data set that the Trainer has made ready."""
        adopt_order(self, super()._get_train_sampler(self.train_dataset))
        seed = self.args.seed if self.args.data_seed is None else self.args.data_seed
        self._flow_sampler = FlowSampler(weights, num_replicas=1, rank=0, seed=seed)
        self.add_callback(SamplerEpoch(self._flow_sampler))

    # What the Trainer asks of its data

    def _set_signature_columns_if_needed(self) -> None:
        # The Trainer drops the fields that the model's forward does not name, and no forward
        # names the weight.
        super()._set_signature_columns_if_needed()
        if self._batches_have_weights and self.weight_key not in self._signature_columns:
            self._signature_columns = [*self._signature_columns, self.weight_key]

    def _get_train_sampler(self, *args: Any, **kwargs: Any) -> Any:
        if self._flow_sampler is not None:
            return self._flow_sampler
        return super()._get_train_sampler(*args, **kwargs)

    def get_train_dataloader(self) -> Any:
        """Return the Trainer's loader, unless weights would act twice or be sharded twice."""
        loader = super().get_train_dataloader()
        check_loader(loader, weighted_loss=self._batches_have_weights)
        sampler = flow_sampler_of(loader)
        if sampler is not None and sampler.num_replicas > 1:
            raise ValueError(
                "the Trainer shards a sampler's order over the ranks itself, so a rank-aware "
                "FlowSampler would be sharded twice; make it with num_replicas=1, rank=0"
            )
        return loader

    # What the Trainer asks of its loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of an optimiser step and the denominator of its loss."""
        batches, items = super().get_batch_samples(epoch_iterator, num_batches, device)
        if self._replaces_loss and batches:
            counts = [
                count_batch(self._loss(b), b, self._weights(b), normalize=self.normalize)
                for b in batches
            ]
            total = torch.stack([count.to(device, torch.float32) for count in counts]).sum()
            items = mean_over_ranks(total)
        return batches, items

    def _weights(self, batch: Mapping[str, Any]) -> Tensor | None:
        weights: Tensor | None = batch.get(self.weight_key)
        if weights is None and self._batches_have_weights:
            raise ValueError(
                f"a training batch has no {self.weight_key!r}: the data set or the collator "
                "dropped it; keep the column in the data set's format and don't replace "
                "trainer.data_collator after construction"
            )
        return weights

    def _loss(self, batch: Mapping[str, Any]) -> str | SampleLoss:
        """Return what a batch is trained on: the user's function, or the name of a loss."""
        if self.sample_loss is not None:
            return self.sample_loss
        # Asked anew for each batch: a model that does not say what its loss is leaves it to the
        # batch, and another batch may answer differently.
        loss = loss_of(self.model, batch)
        if self.token_rule is not None and loss != "causal_lm":
            raise ValueError(f"token_rule is for causal language models, not for loss {loss!r}")
        return loss

    def compute_loss(
        self,
        model: Any,
        inputs: dict[str, Any],
        return_outputs: bool = False,
        num_items_in_batch: Any = None,
    ) -> Any:
        """Return the weighted loss in training and the Trainer's own in evaluation."""
        if not (self._replaces_loss and self.model.training):
            return super().compute_loss(
                model, inputs, return_outputs, num_items_in_batch=num_items_in_batch
            )
        self._loss_was_replaced = True
        weights = self._weights(inputs)
        loss, outputs = self._weighted_loss(
            model, self._without_weights(inputs), weights, num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], weights: Any, num_items: Any
    ) -> tuple[Tensor, Any]:
        """Return the weighted loss of a batch, and the model's outputs."""
        loss = self._loss(inputs)
        # A model without labels spares itself a loss that nobody reads. Two need them: an
        # encoder-decoder makes its decoder's inputs from them, and a user's function may read
        # from the outputs what the model made of them.
        needs_labels = loss == "seq2seq_lm" or not isinstance(loss, str)
        outputs = model(**{k: v for k, v in inputs.items() if needs_labels or k != "labels"})
        value = weighted_loss(
            loss,
            outputs,
            inputs,
            weights,
            model=self.model,
            normalize=self.normalize,
            num_items=num_items,
            token_rule=self.token_rule,
        )
        steps = self.current_gradient_accumulation_steps
        return value + router_loss(self.model, outputs, steps), outputs

    def training_step(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's step and refuse a loss that was made without the weights."""
        self._loss_was_replaced = False
        loss = super().training_step(*args, **kwargs)
        if self._replaces_loss and not self._loss_was_replaced:
            raise RuntimeError(
                f"{type(self).__name__}.compute_loss made a loss that ignores the weights (such as "
                "outputs.loss); call super().compute_loss in it, or pass sample_loss="
            )
        return loss

    def prediction_step(self, model: Any, inputs: Any, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's evaluation step without weights, if the data has any."""
        return super().prediction_step(model, self._without_weights(inputs), *args, **kwargs)

    def _without_weights(self, inputs: Mapping[str, Any]) -> dict[str, Any]:
        return {key: value for key, value in inputs.items() if key != self.weight_key}


class FlowTrainer(FlowTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on Σ weight · loss; see `FlowTrainerMixin` for its arguments.

    ``FlowTrainer(model, args, train_dataset=dataset, scores=scores).train()``
    """


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
