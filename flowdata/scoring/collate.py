"""Collation: how samples become a batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import default_collate

from flowdata.models.calling import innermost, parameters_of
from flowdata.scoring.language.inputs import labels_of, requires_mask
from flowdata.targets.labels import IGNORE_INDEX, LABEL_FIELDS, UNSIGNED
from flowdata.targets.which_loss import OWN, is_hugging_face, loss_of_model

Collate = Callable[[list[Any]], Any]
_READ_BY_COLLATION = ("input_ids", "attention_mask", "position_ids")


def choose_collate(
    collate_fn: Collate | None, sample: Any, model: nn.Module, loss: Any = "auto"
) -> Collate:
    """Return the user's collate function, or the one that fits a data set and a model.

    Args:
        collate_fn: the user's; None for one that fits.
        sample: the data set's first sample: with `input_ids` it is padded, without it is stacked.
        model: says which token is padding.
        loss: the loss's name; a callable, or ``"auto"`` as long as it isn't known.

    Raises:
        ValueError: the sample is text, which the model can't read.
    """
    if collate_fn is not None:
        return collate_fn
    if not callable(loss):
        _check_tokenised(sample, model)
    if not (isinstance(sample, Mapping) and "input_ids" in sample):
        return stack_collate
    # These losses read no padding: it has no target, and no other position sees it. Any token will
    # do, where a classifier's decoder has to recognise it.
    of_aligned_labels: dict[Any, Collate] = {"causal_lm": pad_causal, "masked_lm": pad_aligned}
    # The own loss is made of each sample alone, which has no padding to be hidden; and no position
    # of a causal model sees padding to its right.
    is_causal = callable(loss) and loss_of_model(innermost(model)) == "causal_lm"
    needs_mask = requires_mask(model) or not (loss == OWN or is_causal)
    pad = pad_collate if needs_mask else pad_around_documents
    return of_aligned_labels.get(loss) or partial(pad, token=_padding_token(model))


def fields_given(
    model: nn.Module, dataset: Any, collate_fn: Collate | None, loss: Any
) -> list[str] | None:
    """Return the names that columns of tokens need to play a part in losses; None where any may.

    Args:
        model: its forward says which fields it takes.
        dataset: map-style; columns with names are those of a Hugging Face data set.
        collate_fn: the user's, which may read anything.
        loss: the loss's name, or a callable, which may read anything.
    """
    names = getattr(dataset, "column_names", None)
    parameters = parameters_of(model)
    is_of_tokens = isinstance(names, list) and "input_ids" in names and "input_ids" in parameters
    has_transform = is_of_tokens and dataset.format["type"] == "custom"  # it may read any column
    if collate_fn is not None or not isinstance(loss, str) or not is_of_tokens or has_transform:
        return None
    return sorted({*parameters, *_READ_BY_COLLATION, *LABEL_FIELDS})


def _padding_token(model: nn.Module) -> int:
    """The token that a model takes for padding, 0 where it says none.

    A decoder that classifies reads a text's last token, which it finds by this one.
    """
    config: Any = getattr(innermost(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    token, size = getattr(config, "pad_token_id", None), getattr(config, "vocab_size", 0)
    return token if isinstance(token, int) and 0 <= token < size else 0


def check_stackable(sample: Any) -> None:
    """Raise ValueError if default collation would turn a sample's fields inside out.

    Of lists it stacks the first values of all samples, then the second ones, and so on: (T, B).
    """
    if not isinstance(sample, Mapping) or "input_ids" in sample:
        return
    for name, value in sample.items():
        if isinstance(value, list) and value and isinstance(value[0], int | float | list):
            raise ValueError(
                f"samples hold {name!r} as a list, which default collation would take apart; give "
                "tensors (a Hugging Face data set: .with_format('torch')), or pass a collate_fn"
            )


def _check_tokenised(sample: Any, model: nn.Module) -> None:
    """Raise ValueError if a sample is text, or chats, where a Hugging Face model takes tokens."""
    if not is_hugging_face(model):
        return
    fields = sample if isinstance(sample, Mapping) else {"text": sample}
    inputs = {name: value for name, value in fields.items() if name not in LABEL_FIELDS}
    if inputs and all(_is_text(value) for value in inputs.values()):
        raise ValueError(
            f"samples hold text ({', '.join(map(repr, inputs))}), and "
            f"{type(innermost(model)).__name__} takes tokens: tokenise the data set first "
            "(dataset.map(lambda row: tokenizer(row['text']))), or pass a collate_fn that does; "
            "`flowdata score` and FlowSFTTrainer tokenise themselves"
        )


def _is_text(value: Any) -> bool:
    """Whether a value is a string, or a list of them or of a chat's messages."""
    if isinstance(value, list) and value:
        return all(isinstance(part, str | Mapping) for part in value)
    return isinstance(value, str)


def stack_collate(samples: list[Any]) -> Any:
    """Return `default_collate`'s batch.

    Raises:
        ValueError: samples that can't be stacked.
    """
    try:
        return default_collate(samples)
    except (RuntimeError, TypeError) as error:
        reason = _why_not_stacked(samples) or (
            f" ({error}); make them tensors of one shape, as by a transform, or pass a collate_fn "
            "that makes a batch of them"
        )
        raise ValueError(f"samples can't be stacked to a batch{reason}") from error


def _why_not_stacked(samples: list[Any]) -> str:
    """What to do about samples that hold None, or images of PIL, else ""."""
    parts = [part for sample in samples for part in _parts_of(sample)]
    missing = next((name for name, value in parts if value is None), None)
    if missing is not None:
        return (
            f": {missing} is None; give it a value ({IGNORE_INDEX} where no class counts), or "
            "leave the sample out"
        )
    if any(hasattr(value, "mode") and hasattr(value, "tobytes") for _, value in parts):
        return (
            ": they hold images of PIL; give the data set the transform of the model's evaluation, "
            "which ends in tensors, or pass a collate_fn that calls the model's processor"
        )
    return ""


def _parts_of(sample: Any) -> list[tuple[str, Any]]:
    """A sample's parts, each with what a message calls it."""
    if isinstance(sample, Mapping):
        return [(repr(name), value) for name, value in sample.items()]
    if not isinstance(sample, tuple | list):
        return [("a sample", sample)]
    names = ["the input", "the target"] if len(sample) == 2 else []
    names = names or [f"part {place} of a sample" for place in range(len(sample))]
    return list(zip(names, sample, strict=True))


def pad_collate(samples: list[Mapping[str, Any]], *, token: int = 0) -> dict[str, Any]:
    """Return a batch of token samples, padded on the right to the longest.

    `input_ids` and every field as long as them become (B, T) tensors, `input_ids` padded with
    `token`, `labels` with −100 and all else with 0; `attention_mask` is made where the samples
    have none. Numbers become (B,) tensors, other fields stay lists, or are left out where not all
    samples have them.

    Raises:
        ValueError: a sample's `input_ids` are not one-dimensional, or it lacks a field that
            others have.
    """
    if not any(len(sample["input_ids"]) for sample in samples):
        # No model runs on a batch of shape (B, 0).
        samples = [_one_padding_token(sample, token) for sample in samples]
    paddings = {"labels": IGNORE_INDEX, "input_ids": token}
    batch: dict[str, Any] = {}
    for name in {name: None for sample in samples for name in sample}:
        values = [sample[name] for sample in samples if name in sample]
        if len(values) == len(samples):
            batch[name] = _stack(name, values, paddings.get(name, 0))
        elif not _is_note(values[0]):
            raise ValueError(
                f"only some samples have a field {name!r}: give it to all of them or none, or "
                "pass a collate_fn"
            )
    if "attention_mask" not in batch:
        masks = [torch.ones(len(sample["input_ids"]), dtype=torch.long) for sample in samples]
        batch["attention_mask"] = _stack("attention_mask", masks, 0)
    return batch


def _one_padding_token(sample: Mapping[str, Any], token: int) -> dict[str, Any]:
    """A sample without tokens as one with a single padding token, which is no target."""
    padding = {"input_ids": torch.tensor([token]), "labels": torch.tensor([IGNORE_INDEX])}
    zero = torch.zeros(1, dtype=torch.long)
    fields = {
        name: padding.get(name, zero) if np.ndim(value) == 1 else value
        for name, value in sample.items()
    }
    return fields | {"attention_mask": zero}


def pad_aligned(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `pad_collate`'s batch of samples that have one label for each token.

    Raises:
        ValueError: a sample has more or fewer `labels` than `input_ids`.
    """
    for sample in samples:
        if sample.get("labels", ()) is None:
            raise ValueError(
                "'labels' of a sample is None; leave the field out where every token is a target, "
                f"or give a label for each of its input_ids, {IGNORE_INDEX} where nothing counts"
            )
        tokens, labels = len(sample["input_ids"]), len(sample.get("labels", sample["input_ids"]))
        if labels != tokens:
            raise ValueError(
                f"a sample must have a label for each of its input_ids, {IGNORE_INDEX} where "
                f"nothing counts, got {labels} labels for {tokens} tokens, the first "
                f"{torch.as_tensor(sample['input_ids'][:8]).tolist()}"
            )
    return pad_collate(samples)


def pad_causal(samples: list[Mapping[str, Any]]) -> dict[str, Any]:
    """Return `pad_aligned`'s batch; without the mask that it adds where samples have positions.

    The mask says which positions are targets, before it is left out.
    """
    batch = pad_aligned(samples)
    if "position_ids" in batch and "attention_mask" not in samples[0]:
        batch["labels"] = labels_of(batch, "causal_lm")
        del batch["attention_mask"]
    return batch


def pad_around_documents(samples: list[Mapping[str, Any]], *, token: int = 0) -> dict[str, Any]:
    """Return `pad_collate`'s batch; without the mask that it adds where positions begin again.

    Hugging Face's models read from `position_ids` where packed documents begin, as in training,
    unless there is a mask.
    """
    batch = pad_collate(samples, token=token)
    positions = batch.get("position_ids")
    if "attention_mask" in samples[0] or not isinstance(positions, Tensor) or positions.dim() != 2:
        return batch
    if bool(((positions.diff(dim=1) != 1) & (batch["attention_mask"][:, 1:] != 0)).any()):
        del batch["attention_mask"]
    return batch


def _stack(name: str, values: list[Any], padding: int) -> Any:
    """A field of all samples as one tensor, padded where lengths differ; notes stay a list."""
    if _is_note(values[0]):
        return values
    try:
        tensors = [torch.as_tensor(value) for value in values]
        narrow = (*UNSIGNED, torch.int8, torch.int16, torch.int32)
        tensors = [each.long() if each.dtype in narrow else each for each in tensors]
    except (TypeError, ValueError, RuntimeError):
        return values
    if name == "input_ids" and any(tensor.dim() != 1 for tensor in tensors):
        raise ValueError(
            f"a sample's input_ids must be one-dimensional, got shape "
            f"{tuple(next(t.shape for t in tensors if t.dim() != 1))}; tokenise without "
            "return_tensors, or pass a collate_fn"
        )
    if name == "input_ids" and any(tensor.is_floating_point() for tensor in tensors):
        raise ValueError("a sample's input_ids must be integers, got floating-point numbers")
    if len({tensor.shape[1:] for tensor in tensors}) > 1:
        shapes = [tuple(tensor.shape) for tensor in tensors]
        other = next(shape for shape in shapes if shape[1:] != shapes[0][1:])
        raise ValueError(
            f"{name!r} can be padded along its first axis alone, got shapes {shapes[0]} and "
            f"{other}; pass a collate_fn that makes a batch of them, or batch_size=1"
        )
    if any(tensor.shape != tensors[0].shape for tensor in tensors):
        return nn.utils.rnn.pad_sequence(tensors, batch_first=True, padding_value=padding)
    return torch.stack(tensors)


def _is_note(value: Any) -> bool:
    """Whether a field is a note for readers, which no model takes."""
    return value is None or isinstance(value, str | bytes | Mapping)
