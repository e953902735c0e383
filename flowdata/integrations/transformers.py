"""Hugging Face Trainer: a mixin that makes any Trainer train on the weights, exactly."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import torch
from accelerate.utils import gather_object  # type: ignore[import-untyped]
from torch import Tensor
from transformers import Trainer

from flowdata._common.real_numbers import RealNumber
from flowdata.accumulation import mean_over_ranks
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.callbacks import LoaderCheck, SamplerEpoch, StepAccount
from flowdata.integrations.checks import carries_weights, check_temperature_acts
from flowdata.integrations.evaluation import UnweightedEvaluation, unweighted
from flowdata.integrations.first_batch import Decision, decide, merged
from flowdata.integrations.later_batches import proven_loss
from flowdata.integrations.other_trainers import (
    adopt_order,
    check_data_by_name,
    check_own_loss,
    has_own_loss,
)
from flowdata.integrations.own_scores import (
    check_auto,
    feed_of,
    score_batches,
    weights_of_targets,
)
from flowdata.integrations.prepared import (
    BatchCollator,
    add_weights,
    check_not_a_stream,
    take_weights,
)
from flowdata.integrations.sample_by_sample import weighted_own_loss
from flowdata.integrations.trainer_anchor import add_anchor as add_anchor
from flowdata.integrations.trainer_checks import (
    changes_token_losses,
    check_anchor,
    check_arguments,
    check_data,
    check_drawn_data,
    check_rows,
    check_run_loss,
    check_train_loader,
    lost_weight,
)
from flowdata.integrations.trainer_drift import DriftCallback as DriftCallback
from flowdata.integrations.trainer_loss import (
    SampleLoss,
    count_batch,
    fields_for,
    reference_options,
)
from flowdata.losses import Normalize
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.targets.own_loss import named_terms
from flowdata.targets.which_loss import OWN
from flowdata.token_weights import TokenRule
from flowdata.weights import Temperature


class FlowTrainerMixin(UnweightedEvaluation):
    """Put before any `Trainer` class, it trains on Σ weight · loss, or on resampled batches.

    ``class MyFlowTrainer(FlowTrainerMixin, MyTrainer): ...``; `FlowTrainer` is that for
    `Trainer`. The denominator is counted over the accumulated batches and the ranks of each
    optimiser step, so gradients are those of the whole step however it is cut. Evaluation is
    left as it was: unweighted, with the model's own loss.

    Before the first step the model is called once more: the unweighted loss of the first batch has
    to be the model's own (class weights, smoothing, a replaced `loss_function` and all), or the
    run is refused.

    Args:
        *args: the Trainer's own, before its `train_dataset`.
        train_dataset: the data set, or one whose samples carry their weight already: a
            `FlowWeightedDataset`, or samples with a `weight_key` (`Scores.to_column` adds it to a
            Hugging Face data set), 0-d per sample or one for each token.
        scores: `Scores`, or (N,) weights, of `train_dataset`; None if it carries them. ``"auto"``
            scores, before training, what the Trainer itself will feed: its tokens, its columns, its
            collator, one sample at a time (kept as `trainer.scores`).
        store: the folder or URL where ``scores="auto"`` keeps its losses; it goes on there, or
            finds them. None scores anew each time.
        temperature: as in `resolve_temperature`, of `scores`; weights that are carried have theirs.
        resample: draw samples ∝ weight (`FlowSampler`) and leave the loss alone.
        normalize: ``"count"`` or ``"weights"``, as in `causal_lm_loss`.
        token_rule: for causal language models, as in `causal_lm_loss`; not with ``"weights"``.
        kl_to_reference: for causal language models, as in `causal_lm_loss`; with `reference`.
        reference: ``"base"``, a PEFT model with its adapters off: one more forward a batch.
        loss: a name, as for `LossScorer`, which has to agree with the model's own loss; ``"auto"``
            finds it out. ``"own"`` takes the model's own loss of each sample, one forward for each;
            a callable (outputs, batch) -> (B,) is taken as it is.
        weight_key: the weight's name in samples and batches.
        **kwargs: the Trainer's own.

    Raises:
        ScoreMismatchError: `scores` are of another data set.
        TypeError: `train_dataset` came by position.
        ValueError: the weights are missing or passed twice; an option would drop them
            (`label_smoothing_factor`, `compute_loss_func`, `group_by_length` beside `resample`).
            In `train()`: the loss is not the model's own, both numbers named; the loader doesn't
            use the sampler that was made; or a sampler or stream would be sharded twice.
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
        kl_to_reference: RealNumber | None = None,
        reference: Literal["base"] | None = None,
        loss: str | SampleLoss = "auto",
        weight_key: str = "weight",
        **kwargs: Any,
    ) -> None:
        check_data_by_name(super().__init__, args)
        carried = carries_weights(train_dataset, weight_key, stream_does=scores is None)
        strength = check_anchor(kl_to_reference, reference)
        changes = changes_token_losses(token_rule, strength)
        check_data(
            train_dataset, scores, weight_key, carried=carried, resample=resample, changes=changes
        )
        check_temperature_acts(temperature, train_dataset, scores)
        check_run_loss(loss, token_rule, normalize, resample=resample, changes=changes)
        check_auto(scores, store, own_loss=resample and has_own_loss(type(self), FlowTrainerMixin))
        is_auto = isinstance(scores, str)
        self.weight_key, self.normalize, self.loss = weight_key, normalize, loss
        self.token_rule, self.kl_to_reference, self._changes = token_rule, strength, changes
        self._decision: Decision | None = None
        self._step = StepAccount()
        self._batches_have_weights = not resample and (scores is not None or carried)
        self._replaces_loss = self._batches_have_weights or changes is not None
        self._resamples, self._flow_sampler = resample, None
        self.scores = None if isinstance(scores, str) else scores
        if self._replaces_loss:
            check_own_loss(type(self), FlowTrainerMixin, loss=loss, auto=is_auto)
        train_dataset, weights = self._give_weights(train_dataset, temperature)
        self._given_data = train_dataset
        if "eval_dataset" in kwargs:
            kwargs["eval_dataset"] = unweighted(kwargs["eval_dataset"])
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        self._given_data = None
        self.add_callback(LoaderCheck(self))
        check_rows(self)
        if self._replaces_loss:
            self._check_arguments()
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
            self.add_callback(self._step)
            self.data_collator = BatchCollator(self.data_collator, weight_key)

    def __init_subclass__(cls, **kwargs: Any) -> None:
        super().__init_subclass__(**kwargs)
        order = cls.__mro__
        if Trainer in order and order.index(Trainer) < order.index(FlowTrainerMixin):
            raise TypeError(
                f"{cls.__name__}: put FlowTrainerMixin before the Trainer, "
                "class X(FlowTrainerMixin, MyTrainer), or it never comes into play"
            )

    def _give_weights(self, dataset: Any, temperature: Temperature) -> tuple[Any, Any]:
        """Return the data set as the Trainer gets it, and the weights where they are known yet."""
        plain, weights = dataset, self.scores
        if isinstance(dataset, FlowWeightedDataset):
            # It is taken apart and made again, in the layout that a Trainer's collator can read.
            plain, weights = dataset.dataset, dataset.weights
        if weights is None:
            return dataset, None
        if not self._resamples:
            return self._with_weights(plain, weights, temperature), weights
        check_not_a_stream(plain, "resample=True")
        weights = FlowWeightedDataset(plain, weights, temperature=temperature).weights
        return add_weights(plain, weights, self.weight_key), weights

    def _with_weights(self, dataset: Any, scores: Any, temperature: Temperature) -> Any:
        """Return the data set with a weight in each sample."""
        check_not_a_stream(dataset, "scores=")
        is_mapping = isinstance(dataset[0], Mapping)
        named: dict[str, Any] = {"layout": "dict", "key": self.weight_key} if is_mapping else {}
        return FlowWeightedDataset(dataset, scores, temperature=temperature, **named)

    def _check_arguments(self) -> None:
        """Refuse the Trainer's own options under which weights would be dropped or cut wrongly."""
        check_arguments(self)

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
        self._drawn_data = self.train_dataset
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

    def train(self, *args: Any, **kwargs: Any) -> Any:
        """Run the Trainer's training; what the loss is gets decided anew on its first batch."""
        self._decision = None
        if self._replaces_loss:
            self._check_arguments()  # once more: attributes may have been set since
            # The loss is divided by the items of the whole step; without this word the Trainer
            # might divide it by the number of accumulated batches once more.
            self.loss_is_scaled_for_ga = True
        return super().train(*args, **kwargs)

    def check_train_loader(self, loader: Any) -> None:
        """Refuse the loader of a run that would train on other samples than the weights say."""
        check_train_loader(loader, self._flow_sampler, weighted_loss=self._batches_have_weights)
        if self._flow_sampler is not None:
            check_drawn_data(self._drawn_data, self.train_dataset, loader)

    # What the Trainer asks of its loss

    def get_batch_samples(
        self, epoch_iterator: Any, num_batches: int, device: torch.device
    ) -> tuple[list[Any], Any]:
        """Return the batches of an optimiser step and the denominator of its loss."""
        number = self._step.missing(num_batches)
        batches, items = super().get_batch_samples(epoch_iterator, number, device)
        if self._replaces_loss and (batches := self._step.open(batches, num_batches)):
            parts = [(self._without_weights(batch), self._weights(batch)) for batch in batches]
            if self._decision is None or not self._decision.is_settled:
                self._decision = self._decide_together(parts)
            run = self._decision.run
            counts = [count_batch(run, *part, normalize=self.normalize) for part in parts]
            total = torch.stack([count.to(device, torch.float32) for count in counts]).sum()
            items = mean_over_ranks(total)
        return batches, items

    def _weights(self, batch: Mapping[str, Any]) -> Tensor | None:
        weights: Tensor | None = batch.get(self.weight_key)
        if weights is None and self._batches_have_weights:
            raise lost_weight(self.weight_key)
        return weights

    def _decide_together(self, parts: list[tuple[dict[str, Any], Tensor | None]]) -> Decision:
        """Return what all ranks train on, as far as their first batches with a target tell."""
        for part in parts:
            self._decision = decision = self._decide(*part)
            if decision.is_known or self.loss == OWN:  # each look at which is a run of every sample
                break
        if self.accelerator.num_processes > 1 and isinstance(self.loss, str):
            decision = merged(gather_object([decision]))
        if self._changes is not None and decision.run.loss != "causal_lm":
            raise ValueError(
                f"{self._changes} is for causal language models, not for loss {decision.run.loss!r}"
            )
        return decision

    def _decide(self, inputs: dict[str, Any], weights: Tensor | None) -> Decision:
        """Return what a batch tells of the loss."""
        inputs = self._prepare_inputs(inputs)
        size = len(weights if weights is not None else next(iter(inputs.values())))
        self.model.train()  # as every step does
        with self.compute_loss_context_manager():
            return decide(self.model, inputs, self.loss, size, self._decision)

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
        self._step.add_loss(num_items_in_batch)
        weights = self._weights(inputs)
        loss, outputs = self._weighted_loss(
            model, self._without_weights(inputs), weights, num_items_in_batch
        )
        return (loss, outputs) if return_outputs else loss

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], weights: Any, num_items: Any
    ) -> tuple[Tensor, Any]:
        """Return the weighted loss of a batch, and the model's outputs."""
        if self._decision is None:  # called by hand, outside a run
            self._decision = self._decide_together([(inputs, weights)])
        run = self._decision.run
        options: Any = {"normalize": self.normalize, "num_items": num_items}
        if run.loss == OWN:
            return weighted_own_loss(run, model, inputs, weights, **options), None
        fields, rule = fields_for(run, inputs), self.token_rule
        if self.kl_to_reference:
            options |= reference_options(run, model, fields, self.kl_to_reference)
        outputs = model(**fields)
        value = proven_loss(model, run, outputs, inputs, weights, token_rule=rule, **options)
        # A mixture of experts' balancing loss is a mean over a batch and not a sum over items.
        steps = 1 if num_items is None else self.current_gradient_accumulation_steps
        return value + named_terms(outputs, run.factors) / steps, outputs


class FlowTrainer(FlowTrainerMixin, Trainer):  # type: ignore[misc]
    """`transformers.Trainer` on Σ weight · loss; see `FlowTrainerMixin` for its arguments.

    ``FlowTrainer(model, args, train_dataset=dataset, scores=scores).train()``
    """
