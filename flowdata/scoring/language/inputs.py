"""Inputs: a batch of token samples as what a language model is given, and its targets.

All of it is made on the host, where sizes can be looked at without waiting for a device.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.models.calling import innermost
from flowdata.models.tensors import to_device
from flowdata.targets.labels import IGNORE_INDEX


@dataclass(frozen=True)
class Work:
    """One call of a model, and what to read off its outputs.

    Attributes:
        inputs: the call's keyword arguments.
        shape: (B, T), of the call's output positions.
        places: (n,) int64, those positions that have a target, counted through all of B × T.
        targets: (n,) int64, their targets.
        counts: (samples,) int64, targets of each sample, in the order in which they lie.
        around: makes the context that the call needs.
    """

    inputs: dict[str, Any]
    shape: torch.Size
    places: Tensor
    targets: Tensor
    counts: Tensor
    around: Callable[[], AbstractContextManager[Any]] = nullcontext

    def on(self, device: torch.device) -> Work:
        """Return the same with all that the call needs on a device."""
        inputs, places, targets = to_device([self.inputs, self.places, self.targets], device)
        return replace(self, inputs=inputs, places=places, targets=targets)

    def of_targets(self, values: Tensor) -> Tensor:
        """Return those of (B, T, …) values that belong to targets, (n, …)."""
        return values.flatten(0, 1).index_select(0, self.places)


_TARGET_MASKS = ("attention_mask", "completion_mask", "assistant_masks")
Prepare = Callable[[nn.Module, Any], list[Work]]  # of a batch, its samples in order


def make_work(
    inputs: dict[str, Any],
    targets: Tensor,
    counts: Tensor,
    around: Callable[[], AbstractContextManager[Any]] = nullcontext,
) -> Work:
    """Return the work whose targets are given for each output position: (B, T), or −100.

    Raises:
        ValueError: a target is negative and not −100: it would be read as another token.
    """
    flat = targets.flatten()
    places = (flat != IGNORE_INDEX).nonzero().flatten()
    wanted = flat[places]
    if (wanted < 0).any():
        raise ValueError(
            f"labels must be token ids, or {IGNORE_INDEX} where nothing counts, "
            f"got {int(wanted[wanted < 0][0])}"
        )
    return Work(inputs, targets.shape, places, wanted, counts, around)


def padded(loss: str, max_tokens: int | None = None) -> Prepare:
    """Return what runs batches as they were collated, in slices where they exceed `max_tokens`."""

    def prepare(model: nn.Module, batch: Any) -> list[Work]:
        return [_padded_work(model, part, loss) for part in _slices(batch, max_tokens)]

    return prepare


def _padded_work(model: nn.Module, batch: Any, loss: str) -> Work:
    inputs, targets = inputs_and_targets(model, batch, loss)
    return make_work(inputs, targets, (targets != IGNORE_INDEX).sum(1))


def inputs_and_targets(model: nn.Module, batch: Any, loss: str) -> tuple[dict[str, Any], Tensor]:
    """Return a model's inputs and, for each of its output positions, the target or −100.

    Labels are as Hugging Face gives them: unshifted for causal models. Without labels every
    token that is not padding is a target, or, where the batch has a `completion_mask` or
    `assistant_masks` as TRL makes them, every token that they mark.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            f"loss={loss!r} needs batches that are mappings with 'input_ids' and 'labels', got "
            f"{type(batch).__name__}; pass a collate_fn that makes them, or loss=callable"
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = labels_of(batch, loss)
    if loss == "causal_lm":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        mask = inputs.get("attention_mask")
        if mask is not None and mask.dim() == 2:  # padding on the left predicts nothing
            labels = labels.masked_fill(mask.cumsum(1) == 0, IGNORE_INDEX)
        if not _wants_mask(model, inputs):
            inputs = _without_right_padding_mask(inputs)
    elif loss == "seq2seq_lm" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(innermost(model), labels)
    return inputs, labels


def rows_of(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return some samples of a batch, without padding on the right that all of them have."""
    size = len(batch["input_ids"])
    fields = {
        key: value[start:stop]
        for key, value in batch.items()
        if isinstance(value, Tensor | list) and len(value) == size
    }
    mask = fields.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width, length = mask.shape[1], int(mask.nonzero()[:, 1].max()) + 1 if mask.any() else 1
        for key, value in fields.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
                fields[key] = value[:, :length]
    return fields


def _slices(batch: Any, max_tokens: int | None) -> list[Any]:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if max_tokens is None or not isinstance(ids, Tensor) or ids.numel() <= max_tokens:
        return [batch]
    if any(len(value) != len(ids) for value in batch.values() if isinstance(value, Tensor)):
        return [batch]  # fields of another layout can't be cut
    step = max(1, max_tokens // ids.shape[1])
    return [rows_of(batch, start, start + step) for start in range(0, len(ids), step)]


def labels_of(batch: Mapping[str, Any], loss: str) -> Tensor:
    """Return a batch's unshifted labels, (B, T); where it has none, those that its masks leave."""
    if "labels" in batch:
        labels: Tensor = batch["labels"]
        return labels
    if loss != "causal_lm":
        raise ValueError(f"loss={loss!r} needs 'labels' in every sample, −100 where nothing counts")
    ids: Tensor = batch["input_ids"]
    for mask in filter(lambda name: name in batch, _TARGET_MASKS):
        ids = ids.masked_fill(batch[mask] == 0, IGNORE_INDEX)
    return ids


def _wants_mask(model: nn.Module, inputs: Mapping[str, Any]) -> bool:
    """Whether leaving a mask out would change what a model does.

    Hugging Face's models read packed sequences out of `position_ids` where there is no mask; a
    `forward` may have no default for it.
    """
    wanted = inspect.signature(innermost(model).forward).parameters.get("attention_mask")
    required = wanted is not None and wanted.default is inspect.Parameter.empty
    return required or "position_ids" in inputs


def _without_right_padding_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Drop a mask that causality makes needless; else count positions from the first real token.

    No position of a causal model sees padding to its right, and without a mask attention takes
    its fastest kernel.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return inputs
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return {key: value for key, value in inputs.items() if key != "attention_mask"}
    return inputs | {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    raise ValueError(
        "loss='seq2seq_lm' needs 'decoder_input_ids' in the batch: the model can't make them"
    )
