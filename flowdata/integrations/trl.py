"""TRL's SFTTrainer on the weights.

SFTTrainer prepares the data itself and computes the loss in a head of its own. The weights go
through both: as a column through its templates, truncation and packing, and as factors on the
log-probabilities that its head returns.
"""

from __future__ import annotations

import copy
import dataclasses
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor, nn
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.first_batch import Decision
from flowdata.integrations.own_scores import feed_of, score_batches
from flowdata.integrations.prepared import remark_on_tokens
from flowdata.integrations.sft_head import Rows, base_hidden, recorded_hidden
from flowdata.integrations.trainer_loss import RunLoss
from flowdata.integrations.transformers import FlowTrainerMixin
from flowdata.losses import count_items, target_weights
from flowdata.scores import Scores
from flowdata.token_weights import looks_at_logits, rule_weights
from flowdata.weights import Temperature


class FlowSFTTrainer(FlowTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` on Σ weight · loss; see `FlowTrainerMixin` for its arguments.

    ``FlowSFTTrainer(model, args, train_dataset=dataset, scores=scores).train()``

    The weights follow their samples, or tokens, through chat templates, completion-only and
    assistant-only labels, truncation, packing, padding-free batches and images; TRL's own metrics
    stay as they are. In a pack each token has the weight of its sample. Token weights need a
    tokenised data set (`input_ids`): before that there are no tokens to weigh. Liger's kernels
    (`use_liger_kernel`) take the place of layers alone, since SFTTrainer refuses Liger's own loss.

    ``scores="auto"`` scores the samples as they come out of SFTTrainer's preparation, through its
    collator. Packs are made afterwards: samples are scored whole, or cut to `max_length` where
    ``packing_strategy="bfd"`` cuts them.

    ``token_rule="eaft"`` and `kl_to_reference` are made from the hidden states that SFTTrainer's
    head is given, tile by tile: further passes through the output layer, which must not be sharded.

    Raises:
        ImportError: as `FlowTrainerMixin`; also an older TRL, whose default loss has no weights.
        ValueError: as `FlowTrainerMixin`; also ``loss_type="dft"`` (use ``token_rule="dft"``),
            token weights in a data set that is not tokenised, ``resample=True`` of packs, or
            ``reference="base"`` where the output layer itself is trained; in `train()`, a
            `compute_loss` of another class that is no sum of log-probabilities.
    """

    _head_is_checked = False

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        if isinstance(train_dataset, FlowWeightedDataset):
            raise ValueError(
                "SFTTrainer prepares Hugging Face data sets only, got a FlowWeightedDataset; pass "
                "train_dataset=dataset, scores=scores"
            )
        self._sums_log_probs = False  # as the first batch is to show
        super().__init__(*args, train_dataset=train_dataset, **kwargs)

    def _check_arguments(self) -> None:
        super()._check_arguments()
        if self.args.loss_type == "chunked_nll":
            raise ImportError(
                "this TRL takes its losses from a forward of its own, where weights can't reach "
                "them; install trl 1.15 or newer, which needs Python 3.11 or newer"
            )
        if self.args.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.args.loss_type!r} would apply to losses already weighted; use "
                f"loss_type='nll' with token_rule={self.args.loss_type!r}"
            )

    def _with_weights(self, dataset: Any, scores: Any, temperature: Temperature) -> Any:
        if not isinstance(dataset, Dataset):
            raise ValueError(
                f"scores need a datasets.Dataset, got {type(dataset).__name__}; for a stream, give "
                f"its samples a {self.weight_key!r} of their own"
            )
        weighted = FlowWeightedDataset(dataset, scores, temperature=temperature)
        return dataset.add_column(self.weight_key, weighted.weights.numpy())

    def _prepare_dataset(
        self,
        dataset: Any,
        processing_class: Any,
        args: Any,
        packing: bool,
        formatting_func: Any,
        dataset_name: str,
    ) -> Any:
        # Evaluation data may have any name, so the training data is known by what it is. It comes
        # first; an evaluation on the same data is prepared as any other.
        is_training_data = dataset is self._given_data
        self._given_data = None
        if is_training_data and packing and self._resamples:
            raise ValueError(
                "resample=True draws rows, and with packing=True a row holds tokens of several "
                "samples, each with a weight of its own; use padding_free=True, max_length=None, "
                "which joins what was drawn, or packing without resample, where each token has "
                "its sample's weight"
            )
        is_weighted = is_training_data and self._batches_have_weights
        if is_weighted:
            self._check_token_weights(dataset)
        preparation = args
        if is_weighted and packing:
            if args.max_length is None:
                raise ValueError("packing needs a max_length")
            # SFTTrainer packs input_ids and labels alone and would drop the weights. So it only
            # prepares the samples, uncut, and `_pack` packs them with their weights.
            preparation = copy.copy(args)
            preparation.max_length = None
        prepared = super()._prepare_dataset(
            dataset,
            processing_class,
            preparation,
            packing and not is_weighted,
            formatting_func,
            dataset_name,
        )
        if is_training_data and not (packing or args.shuffle_dataset):
            remark_on_tokens(prepared, self.scores, args.max_length)
        return self._lay_weights(prepared, args) if is_weighted else prepared

    def _check_token_weights(self, dataset: Any) -> None:
        """Refuse token weights of samples whose tokens SFTTrainer is still to make."""
        first = next(iter(dataset))
        if isinstance(first.get(self.weight_key), list) and "input_ids" not in first:
            raise ValueError(
                f"{self.weight_key!r} holds token weights, but the data set is not tokenised yet, "
                "so nobody knows whose they are; tokenise it first (input_ids and labels)"
            )

    def _lay_weights(self, dataset: Any, args: Any) -> Any:
        """Return the prepared data set with weights that fit its rows."""
        first: dict[str, Any] = next(iter(dataset), {})  # all may have been cut to nothing
        weight = first.get(self.weight_key)
        if weight is None or not (args.packing or isinstance(weight, list)):
            return dataset  # not scored yet; or rows are samples, so one weight for each will do
        keep_end = args.truncation_mode == "keep_end" and not args.packing
        options = {"key": self.weight_key, "keep_end": keep_end}
        dataset = dataset.map(_spread_over_tokens, fn_kwargs=options)
        return self._pack(dataset, args) if args.packing else dataset

    def _weigh_prepared(self, weights: Tensor) -> None:
        super()._weigh_prepared(weights)
        if not self._skip_prepare_dataset:
            self.train_dataset = self._lay_weights(self.train_dataset, self.args)

    def _score(self, store: str | Path | None) -> Scores:
        # Before packing, where rows are samples.
        dataset, collator = feed_of(self)
        is_of_packs = "seq_lengths" in dataset.column_names  # of the user's own
        if getattr(collator, "padding_free", False) and not is_of_packs:
            # It would join the samples into one row. Padded, they have the same tokens and targets.
            collator = dataclasses.replace(collator, padding_free=False)
        if self.args.packing and self.args.packing_strategy == "bfd" and not is_of_packs:
            dataset = dataset.map(_cut, fn_kwargs={"length": self.args.max_length})
        return score_batches(self, dataset, collator, store)

    def _pack(self, dataset: Any, args: Any) -> Any:
        """Return the packed data set, as SFTTrainer would make it, with the weights packed too."""
        samples = dataset.select_columns(["input_ids", "labels", self.weight_key])
        packs = pack_dataset(samples, args.max_length, args.packing_strategy)
        return packs.shuffle(seed=args.seed) if args.shuffle_dataset else packs

    def _decide(self, inputs: dict[str, Any], weights: Any) -> Decision:
        # SFTTrainer makes the loss in a head of its own, whatever the model's is.
        if self.loss not in ("auto", "causal_lm"):
            raise ValueError(
                "SFTTrainer's loss is that of a causal language model, so loss= would be ignored; "
                "use FlowTrainerMixin on a Trainer for another"
            )
        return Decision(RunLoss("causal_lm"))

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], weights: Any, num_items: Any
    ) -> tuple[Tensor, Any]:
        """Return SFTTrainer's own loss, on a model whose log-probabilities are weighted.

        SFTTrainer's loss is −Σ log-probability / denominator, and it adds metrics and a mixture of
        experts' balancing loss. All of that stays as it is: the model is replaced by one that
        returns weight · log-probability / denominator, and the denominator by 1.
        """
        labels = inputs["labels"]
        token_weights = target_weights(labels, weights)
        if num_items is None:
            num_items = count_items(labels, weights, normalize=self.normalize)
        # SFTTrainer takes its denominator for a sum over the ranks, and multiplies the loss by
        # their number to undo the mean that DDP takes of the gradients. `num_items` is a mean over
        # the ranks; it becomes their sum.
        factor = 1
        if self.args.average_tokens_across_devices:
            factor = self.accelerator.num_processes // self.get_tp_size()
            num_items = num_items * factor
        # The division is made here because SFTTrainer raises a denominator below 1 to 1, which is
        # right for a count of tokens and wrong for a sum of weights.
        divisor = torch.where(num_items == 0, 1, num_items)
        outputs: list[Any] = []
        weighted: list[Tensor] = []

        def weighted_model(**fields: Any) -> Any:
            # Accelerate's autocast lies in the model's own forward alone. What is run past it, the
            # base's backbone and the output layer, has to be run as the model is.
            with self.accelerator.autocast():
                base = base_hidden(model, fields) if self.kl_to_reference else None
            with recorded_hidden(model) as states:
                output = model(**fields)
            if getattr(output, "log_probs", None) is not None:
                with self.accelerator.autocast():
                    rows = self._rows(output.log_probs, token_weights, states[-1], labels)
                    terms = self._weigh(output.log_probs, token_weights, rows, base)
                output.log_probs = terms / divisor
                weighted.append(output.log_probs)
            outputs.append(output)
            return output

        # Past the mixin, whose compute_loss is the caller, to SFTTrainer's.
        loss = super(FlowTrainerMixin, self).compute_loss(
            weighted_model, inputs, num_items_in_batch=torch.ones_like(divisor)
        )
        if not self._sums_log_probs:
            self._check_loss(loss, weighted, factor)
        return loss, outputs[0]

    def _check_loss(self, loss: Tensor, weighted: list[Tensor], factor: int) -> None:
        """Refuse a loss that is no −Σ log-probability, of a class before SFTTrainer.

        The gradient by each of them is −1, whatever terms the loss has besides.
        """
        gradients = [g for g in _gradients(loss, weighted) if g is not None]
        total = torch.stack(gradients).sum(0) if gradients else torch.zeros(1)
        if loss.requires_grad and not torch.allclose(total, torch.full_like(total, -factor)):
            raise ValueError(
                f"the compute_loss of {type(self).__name__} is not SFTTrainer's sum of "
                "log-probabilities over num_items_in_batch, and weights can't reach another loss: "
                "let it call super().compute_loss(model, inputs, return_outputs, "
                "num_items_in_batch), or pass resample=True, which leaves the loss alone"
            )
        self._sums_log_probs = True

    def _weigh(
        self, log_probs: Tensor, weights: Tensor, rows: Rows | None, base: Tensor | None
    ) -> Tensor:
        """Return −weight · loss of each token, 0 where the weight is 0 whatever the loss is."""
        weights = _along(log_probs, weights)
        takes_part, factors = weights != 0, weights
        if self.token_rule is not None:
            values = -log_probs.flatten()
            if rows is not None and looks_at_logits(self.token_rule):
                values = rows.largest_logits()
            of_rule = rule_weights(self.token_rule, values, takes_part.flatten())
            factors = weights * of_rule.view_as(weights)
        weighted = torch.where(takes_part, log_probs, 0.0) * factors
        if base is None or rows is None:
            return weighted
        return weighted - self.kl_to_reference * weights * rows.divergences(base)

    def _rows(
        self, log_probs: Tensor, weights: Tensor, hidden: Tensor, labels: Tensor
    ) -> Rows | None:
        """What the output layer is given, where a loss takes more than log-probabilities."""
        if not self.kl_to_reference and not looks_at_logits(self.token_rule):
            return None
        rows = Rows.of(self.model, hidden, _along(log_probs, weights) != 0)
        if not self._head_is_checked:
            rows.check(log_probs, labels)
            self._head_is_checked = True
        return rows


def _along(log_probs: Tensor, weights: Tensor) -> Tensor:
    """Weights of labels, (B, T), laid along log-probabilities, (B, T − 1).

    The last position predicts nothing, so it has no weight. The virtual tokens of prompt tuning
    stand before all others, and are no targets.
    """
    weights = weights[:, :-1]
    return nn.functional.pad(weights, (log_probs.shape[1] - weights.shape[1], 0)).to(log_probs)


def _gradients(loss: Tensor, inputs: list[Tensor]) -> tuple[Tensor | None, ...]:
    """The gradients of a loss, None by what it does not depend on."""
    inputs = [each for each in inputs if each.requires_grad]
    if not (inputs and loss.requires_grad):
        return ()
    return torch.autograd.grad(loss, inputs, retain_graph=True, allow_unused=True)


def _spread_over_tokens(sample: dict[str, Any], key: str, keep_end: bool) -> dict[str, Any]:
    """Return one weight for each token that is left of a sample."""
    length, weight = len(sample["input_ids"]), sample[key]
    if not isinstance(weight, list):
        return {key: [weight] * length}
    # SFTTrainer cut the tokens but not their weights: these are cut at the same end.
    return {key: weight[-length:] if keep_end else weight[:length]}


def _cut(sample: dict[str, Any], length: int) -> dict[str, Any]:
    """Return the tokens of a sample that packing keeps."""
    return {name: sample[name][:length] for name in ("input_ids", "labels")}
