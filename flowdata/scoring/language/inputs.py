"""Inputs: what a language model is given of a batch of token samples, and its targets."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import innermost, parameters_of
from flowdata.scoring.language.work import Prepare, Work, make_work
from flowdata.targets.labels import IGNORE_INDEX, describe_batch, next_tokens

# Without labels, tokens at which one of these fields is 0 are no targets.
_TARGET_MASKS = ("attention_mask", "completion_mask", "assistant_masks")


def padded(loss: str, max_tokens: int | None = None, *, keep_mask: bool = False) -> Prepare:
    """Return what prepares batches as they were collated.

    Args:
        loss: the language loss's name.
        max_tokens: a batch of more tokens, padding included, is cut into slices of whole samples.
        keep_mask: give the model all fields as they are, and count what padding predicts: right of
            a sample that was collated alone, and of others where collation pads on the right.
    """

    def prepare(model: nn.Module, batch: Any) -> list[Work]:
        return [_padded_work(model, part, loss, keep_mask) for part in _slices(batch, max_tokens)]

    return prepare


def _padded_work(model: nn.Module, batch: Any, loss: str, keep_mask: bool) -> Work:
    inputs, targets = inputs_and_targets(model, batch, loss, keep_mask=keep_mask)
    return make_work(inputs, targets, (targets != IGNORE_INDEX).sum(1))


def _slices(batch: Any, max_tokens: int | None) -> list[Any]:
    """A batch in slices of whole samples, each of `max_tokens` at most or of one sample."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if max_tokens is None or not isinstance(ids, Tensor) or ids.numel() <= max_tokens:
        return [batch]
    tensors = [value for value in batch.values() if isinstance(value, Tensor)]
    if any(value.shape not in (ids.shape, ids.shape[:1]) for value in tensors):
        return [batch]  # fields of another layout, such as images, can't be cut
    step = max(1, max_tokens // ids.shape[1])
    return [rows_of(batch, start, start + step) for start in range(0, len(ids), step)]


def rows_of(batch: Mapping[str, Any], start: int, stop: int) -> dict[str, Any]:
    """Return samples `start` to `stop` of a batch, without padding on the right that all have.

    Padding with a label is kept. Notes that don't have one entry for each sample are left out.

    Raises:
        ValueError: a tensor has another layout, so that it can't be cut.
    """
    size = len(batch["input_ids"])
    for key, value in batch.items():
        if isinstance(value, Tensor) and (value.dim() == 0 or len(value) != size):
            raise ValueError(f"{key!r} can't be cut into samples: shape {tuple(value.shape)}")
    fields = {
        key: value[start:stop]
        for key, value in batch.items()
        if isinstance(value, Tensor | list) and len(value) == size
    }
    mask = fields.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width = mask.shape[1]
        is_needed = mask != 0
        labels = fields.get("labels")
        if isinstance(labels, Tensor) and labels.shape == mask.shape:
            is_needed = is_needed | (labels != IGNORE_INDEX)
        places = is_needed.nonzero()[:, 1]
        length = int(places.max()) + 1 if len(places) else 1  # no model runs on none
        for key, value in fields.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
                fields[key] = value[:, :length]
    return fields


def last_tokens(batch: Any, most: int) -> Any:
    """Return the last `most` tokens of a batch of texts, or the batch itself where it isn't cut.

    A batch is not cut if it is no longer, if a field is not of its tokens' shape, or if the end of
    a text has no target.

    Args:
        batch: as collated; texts are mappings of (B, T) tensors.
        most: tokens.
    """
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if not isinstance(ids, Tensor) or ids.dim() != 2 or ids.shape[1] <= most:
        return batch
    if any(not isinstance(value, Tensor) or value.shape != ids.shape for value in batch.values()):
        return batch
    end = {name: value[:, -most:] for name, value in batch.items()}
    is_target = labels_of(end, "causal_lm")[:, 1:] != IGNORE_INDEX
    return end if bool(is_target.any(1).all()) else batch


def inputs_and_targets(
    model: nn.Module, batch: Any, loss: str, *, keep_mask: bool = False
) -> tuple[dict[str, Any], Tensor]:
    """Return a model's inputs and the targets of its output positions, (B, T), −100 for none.

    Labels are as Hugging Face gives them: unshifted for causal models. Without labels every
    token that is not padding is a target, or, where the batch has a `completion_mask` or
    `assistant_masks` as TRL makes them, every token that they mark.

    Raises:
        ValueError: a batch without tokens, without the labels that its loss needs, or with labels
            that were shifted already.
    """
    is_mapping = isinstance(batch, Mapping)
    if not is_mapping or not ("input_ids" in batch or (loss == "seq2seq_lm" and "labels" in batch)):
        raise ValueError(
            f"loss={loss!r} needs batches that are mappings with 'input_ids' and 'labels', got "
            f"{describe_batch(batch)}; pass a collate_fn that makes them, or loss=callable"
        )
    if "shift_labels" in batch:
        raise ValueError(
            "a batch has 'shift_labels', labels that were shifted already, as sequence parallelism "
            "makes them; give 'labels' alone, unshifted, each under its own token"
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = labels_of(batch, loss)
    if loss == "causal_lm":
        labels = next_tokens(labels)
        mask = inputs.get("attention_mask")
        if not keep_mask and mask is not None and mask.dim() == 2:
            # Padding that a batch adds on the left predicts nothing: alone a sample has none.
            labels = labels.masked_fill(mask.cumsum(1) == 0, IGNORE_INDEX)
        # Without a mask, Hugging Face's models read packed sequences out of `position_ids`.
        if not (keep_mask or "position_ids" in inputs or requires_mask(model)):
            inputs = _without_right_padding_mask(inputs, labels)
    elif loss == "seq2seq_lm" and "decoder_input_ids" not in inputs:
        inputs |= _decoder_inputs(innermost(model), labels)
    return inputs, labels


def labels_of(batch: Mapping[str, Any], loss: str) -> Tensor:
    """Return a batch's unshifted labels, (B, T).

    Where a causal model's batch has none, they are its tokens, −100 where one of its masks is 0
    and at the first token behind padding on the left, which nothing predicts.

    Raises:
        ValueError: no labels, for a loss that can't do without.
    """
    if "labels" in batch:
        labels: Tensor = batch["labels"]
        return labels if labels.is_floating_point() else labels.long()  # losses take no int32
    if loss != "causal_lm":
        raise ValueError(f"loss={loss!r} needs 'labels' in every sample, −100 where nothing counts")
    ids: Tensor = batch["input_ids"]
    for name in filter(lambda name: name in batch, _TARGET_MASKS):
        mask = batch[name]
        if getattr(mask, "shape", None) != ids.shape:
            shape = tuple(mask.shape) if isinstance(mask, Tensor) else type(mask).__name__
            raise ValueError(
                f"without labels, {name!r} says which tokens count, and must have the shape of "
                f"input_ids, {tuple(ids.shape)}, got {shape}; give 'labels', {IGNORE_INDEX} where "
                "nothing counts"
            )
        is_hidden = _is_hidden(mask)
        ids = ids.masked_fill(is_hidden, IGNORE_INDEX)
        if name == "attention_mask":
            is_first = ((~is_hidden).cumsum(1) <= 1) & is_hidden[:, :1]
            ids = ids.masked_fill(is_first, IGNORE_INDEX)
    return ids.long()


def _is_hidden(mask: Tensor) -> Tensor:
    """Where a mask hides tokens: where it is 0, or far below 0 if it is added to scores."""
    is_added = mask.is_floating_point() and not bool((mask > 0).any())
    return mask < 0 if is_added else mask == 0


def requires_mask(model: nn.Module) -> bool:
    """Return whether a model's `forward` has no default for its mask."""
    parameter = parameters_of(model).get("attention_mask")
    return parameter is not None and parameter.default is inspect.Parameter.empty


def _without_right_padding_mask(inputs: dict[str, Any], targets: Tensor) -> dict[str, Any]:
    """Drop a mask of padding on the right; else count positions from the first real token.

    No position of a causal model sees padding to its right, and without a mask attention takes
    its fastest kernel. Padding that itself predicts a target keeps its mask: it sees real tokens
    alone. What a mask hides further on keeps its position, as in a sample alone.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return inputs
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):  # it never rises: ones, then zeros
        if bool(((targets != IGNORE_INDEX) & (mask == 0)).any()):
            return inputs
        return {key: value for key, value in inputs.items() if key != "attention_mask"}
    padding = (mask.cumsum(1) == 0).sum(1, keepdim=True) % mask.shape[1]  # 0 where all is padding
    if not padding.any():
        return inputs  # some models count positions by the mask themselves
    return inputs | {"position_ids": (torch.arange(mask.shape[1]) - padding).clamp_min(0)}


def _decoder_inputs(model: Any, labels: Tensor) -> dict[str, Tensor]:
    """What a decoder is given: its labels one place further, as the model moves them.

    A model that names no function for it moves the labels itself where it is given them.
    """
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        return {"decoder_input_ids": model.prepare_decoder_input_ids_from_labels(labels=labels)}
    if "labels" in inspect.signature(model.forward).parameters:
        return {"labels": labels}
    raise ValueError(
        "loss='seq2seq_lm' needs 'decoder_input_ids' in the batch: the model can't make them"
    )
