"""TRL's SFTTrainer on the weights: through its preparation, its packing and its fused head."""

from __future__ import annotations

import copy
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor
from trl import SFTTrainer
from trl.data_utils import pack_dataset

from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.transformers import FlowTrainerMixin
from flowdata.losses import count_items, target_weights
from flowdata.token_weights import rule_weights
from flowdata.weights import Temperature


class FlowSFTTrainer(FlowTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """`trl.SFTTrainer` on Σ weight · loss; see `FlowTrainerMixin` for its arguments.

    ``FlowSFTTrainer(model, args, train_dataset=dataset, scores=scores).train()``

    Weights follow their samples, or tokens, through chat templates, completion-only labels,
    truncation, packing and padding-free batches; TRL's own metrics stay as they are. Token
    weights need a tokenised data set (`input_ids`): before that there are no tokens to weigh.

    Raises:
        ValueError: as `FlowTrainerMixin`; also ``loss_type="dft"`` (use ``token_rule="dft"``),
            a data set of images, or token weights in a data set that is not tokenised.
    """

    def __init__(self, *args: Any, train_dataset: Any = None, **kwargs: Any) -> None:
        if isinstance(train_dataset, FlowWeightedDataset):
            raise ValueError(
                "SFTTrainer prepares Hugging Face data sets only, got a FlowWeightedDataset; pass "
                "train_dataset=dataset, scores=scores"
            )
        super().__init__(*args, train_dataset=train_dataset, **kwargs)
        if self._flow and self.args.loss_type != "nll":
            raise ValueError(
                f"loss_type={self.args.loss_type!r} would apply to losses weighted already; use "
                f"loss_type='nll' with token_rule={self.args.loss_type!r}"
            )
        if self._flow and self._is_vision_dataset:
            raise ValueError(
                "data sets of images are not weighted yet; use FlowTrainerMixin on a "
                "Trainer with a collator of your own"
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
        if not (self._weighs and dataset_name == "train"):
            return super()._prepare_dataset(
                dataset, processing_class, args, packing, formatting_func, dataset_name
            )
        key = self.weight_key
        first = next(iter(dataset))
        if isinstance(first.get(key), list) and "input_ids" not in first:
            raise ValueError(
                f"{key!r} holds token weights, but the data set is not tokenised yet, so nobody "
                "knows whose they are; tokenise it first (input_ids and labels)"
            )
        whole = args
        if packing:  # TRL packs input_ids and labels alone: prepared uncut here, and packed below
            whole = copy.copy(args)
            whole.max_length = None
        dataset = super()._prepare_dataset(
            dataset, processing_class, whole, False, formatting_func, dataset_name
        )
        if not (packing or self.padding_free or isinstance(first.get(key), list)):
            return dataset
        keep_end = args.truncation_mode == "keep_end" and not packing
        dataset = dataset.map(_per_token, fn_kwargs={"key": key, "keep_end": keep_end})
        if not packing:
            return dataset
        if args.max_length is None:
            raise ValueError("packing needs a max_length")
        columns = dataset.select_columns(["input_ids", "labels", key])
        packed = pack_dataset(columns, args.max_length, args.packing_strategy)
        return packed.shuffle(seed=args.seed) if args.shuffle_dataset else packed

    def _weighted_loss(
        self, model: Any, inputs: dict[str, Any], weights: Any, num_items: Any
    ) -> tuple[Tensor, Any]:
        """SFTTrainer's own loss, on a model whose log-probabilities are weighted and divided."""
        labels = inputs["labels"]
        per_label = target_weights(labels, weights)[:, :-1]
        if num_items is None:
            num_items = count_items(labels, weights, normalize=self.normalize)
        # SFTTrainer multiplies by the ranks what it takes to be divided by their common count.
        if self.args.average_tokens_across_devices:
            num_items = num_items * self.accelerator.num_processes
        divisor = torch.where(num_items == 0, 1, num_items)
        seen = []

        def weighted_model(**kwargs: Any) -> Any:
            seen.append(outputs := model(**kwargs))
            outputs.log_probs = self._weigh(outputs.log_probs, per_label) / divisor
            return outputs

        loss = super(FlowTrainerMixin, self).compute_loss(
            weighted_model, inputs, num_items_in_batch=torch.ones_like(divisor)
        )
        return loss, seen[0]

    def _weigh(self, log_probs: Tensor, weights: Tensor) -> Tensor:
        weights = weights.to(log_probs)
        takes_part = weights != 0
        if self.token_rule is not None:
            losses = -log_probs.flatten()
            ruled = rule_weights(self.token_rule, losses, takes_part.flatten())
            weights = weights * torch.where(takes_part, ruled.view_as(weights), 0.0)
        return torch.where(takes_part, log_probs, 0.0) * weights


def _per_token(sample: dict[str, Any], key: str, keep_end: bool) -> dict[str, list[float]]:
    """One weight for each token that is left of a sample."""
    length, weight = len(sample["input_ids"]), sample[key]
    if not isinstance(weight, list):
        return {key: [weight] * length}
    return {key: weight[-length:] if keep_end else weight[:length]}
