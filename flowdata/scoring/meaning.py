"""Meaning: what the labels of a job are, told by the model's own loss on a few samples.

The model is given a few samples, each alone and with its labels, and the loss by name that equals
its own is taken: first that which its class is named for (which_loss.py). Where a model makes no
loss, its class's name and the samples have to tell, and where they leave two meanings open the user
has to say which.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata.models.calling import call_with, innermost, output_layer_of
from flowdata.models.positions import check_positions
from flowdata.models.rope import loaded_frequencies
from flowdata.models.tensors import to_device
from flowdata.scoring.language.inputs import labels_of
from flowdata.targets.labels import IGNORE_INDEX, next_tokens, split_batch
from flowdata.targets.own_loss import agrees, own_losses
from flowdata.targets.prediction_losses import binary_cross_entropy, cross_entropy, squared_error
from flowdata.targets.predictions import logits_of, predict
from flowdata.targets.which_loss import PREDICTION_LOSSES, loss_of_batch, loss_of_model


def decide_loss(
    model: nn.Module, batches: Sequence[Any], many: Callable[[], Any], device: torch.device
) -> str:
    """Return the name of the loss that labels are for: one of `LOSSES`, or ``"own"``.

    Args:
        model: the model in eval mode, on the device.
        batches: samples, each collated alone.
        many: makes a batch of more samples, for a model without a loss of its own.
        device: where the model takes its inputs.

    Raises:
        ValueError: nothing tells, or too much does; the message says what `loss` could be.
    """
    try:
        outputs = [output_with_labels(model, to_device(batch, device)) for batch in batches]
    except (IndexError, RuntimeError, TypeError):
        # Labels that are no classes, or a batch of another layout: the run's own checks say which.
        outputs = []
    own_values = [own_losses(model, output) for output in outputs]
    if not any(own_values):
        by_class = loss_of_model(innermost(model))
        return by_class or _decide_by_samples(model, batches, many, device)
    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    by_class = loss_of_model(innermost(model))
    for name in filter(None, (by_class, *_names(model))):
        named = [_named_loss(name, *pair) for pair in zip(outputs, batches, strict=True)]
        if _all_agree(named, own_values, dtype):
            return name
    logger.warning(
        "loss='auto': the model's own loss (%.4g on a sample) has no name here, so it is taken as "
        "it is, loss='own', one sample at a time: several times as slow",
        next(values for values in own_values if values)[0],
    )
    return "own"


def output_with_labels(model: nn.Module, batch: Any) -> Any:
    """Return a model's output for a batch with its labels, as its own `forward` takes them.

    Rotary frequencies are those of the model as it was loaded, and are left as they were.
    """
    with loaded_frequencies(model):
        return _output_with_labels(model, batch)


def _output_with_labels(model: nn.Module, batch: Any) -> Any:
    if not isinstance(batch, Mapping):
        inputs, _ = split_batch(batch)
        return model(*inputs) if isinstance(inputs, tuple | list) else model(inputs)
    if "input_ids" in batch and split_batch(batch)[1] is None:
        batch = {**batch, "labels": labels_of(batch, "causal_lm")}
    if isinstance(ids := batch.get("input_ids"), Tensor):
        check_positions(model, ids.shape[-1])
    with _same_problem(model):
        try:
            return call_with(model, batch, use_cache=False)
        except TypeError as error:
            if "unexpected keyword argument" not in str(error):
                raise
            # A wrapper that takes anything, round a model that takes no labels.
            return call_with(model, split_batch(batch)[0], use_cache=False)


@contextmanager
def _same_problem(model: nn.Module) -> Iterator[None]:
    """Put a configuration's `problem_type` back: classifiers set it when they see labels."""
    config: Any = getattr(innermost(model), "config", None)
    before = getattr(config, "problem_type", None)
    try:
        yield
    finally:
        if getattr(config, "problem_type", None) is not before:
            config.problem_type = before


def _names(model: nn.Module) -> tuple[str, ...]:
    """The losses by name, that first which a model with such an output would be said to have."""
    config: Any = getattr(innermost(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return ("seq2seq_lm", "causal_lm", *PREDICTION_LOSSES)
    if output_layer_of(model) is not None:
        return ("causal_lm", "masked_lm", *PREDICTION_LOSSES)
    return ("causal_lm", *PREDICTION_LOSSES)  # labels in their own places are classes


def _all_agree(
    named: Sequence[float | None], own_values: Sequence[list[float]], dtype: torch.dtype
) -> bool:
    """Whether a loss by name is the model's own on every sample, and a number on one at least."""
    pairs = list(zip(named, own_values, strict=True))
    is_known = any(value is not None and value == value for value in named)  # NaN: no target
    return is_known and all(
        value is not None and any(agrees(each, value, dtype) for each in values)
        for value, values in pairs
        if values
    )


def _named_loss(name: str, output: Any, batch: Any) -> float | None:
    """A sample's loss by a name, None where shapes don't fit it."""
    inputs, targets = split_batch(batch)
    if targets is None and isinstance(inputs, Mapping) and "input_ids" in inputs:
        targets = labels_of(batch, "causal_lm")
    if targets is None:
        return None
    try:
        values = _VALUES[name](logits_of(output).float().cpu(), targets.cpu())
    except (ValueError, RuntimeError, IndexError):
        return None
    return float(values.mean()) if len(values) else float("nan")


def _of_tokens(logits: Tensor, targets: Tensor) -> Tensor:
    if logits.dim() != 3 or targets.dim() != 2 or targets.is_floating_point():
        raise ValueError("no logits of tokens")
    return cross_entropy(logits, targets, classes_last=True).values


def _of_classes(logits: Tensor, targets: Tensor) -> Tensor:
    last = targets.dim() == 2 and not targets.is_floating_point()
    return cross_entropy(logits, targets, classes_last=last).values


_VALUES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "causal_lm": lambda logits, targets: _of_tokens(logits, next_tokens(targets)),
    "masked_lm": _of_tokens,
    "seq2seq_lm": _of_tokens,
    "cross_entropy": _of_classes,
    "binary_cross_entropy": lambda logits, targets: binary_cross_entropy(logits, targets).values,
    "mse": lambda logits, targets: squared_error(logits, targets).values,
}


def _decide_by_samples(
    model: nn.Module, batches: Sequence[Any], many: Callable[[], Any], device: torch.device
) -> str:
    """The loss that targets call for, of a model that makes none."""
    parts = [split_batch(batch) for batch in batches]
    pairs = [(_tokens_of(inputs), targets) for inputs, targets in parts]
    has_label_of_each_token = all(
        ids is not None
        and targets is not None
        and targets.shape == ids.shape
        and not targets.is_floating_point()
        for ids, targets in pairs
    )
    if has_label_of_each_token:
        return _decide_by_tokens(model, batches, device)
    return loss_of_batch(many())


def _tokens_of(inputs: Any) -> Tensor | None:
    """A batch's token ids, (1, T); None where it has none."""
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else inputs
    is_ids = isinstance(ids, Tensor) and ids.dim() == 2 and not ids.is_floating_point()
    return ids if is_ids else None


def _decide_by_tokens(model: nn.Module, batches: Sequence[Any], device: torch.device) -> str:
    """The loss of one label for each token.

    Labels that repeat their own tokens are those of a causal model; a model could copy them
    otherwise. Labels that are the next token have been shifted already. A model with fewer classes
    than there are tokens can't predict tokens.
    """
    pairs = [(_tokens_of(inputs), targets) for inputs, targets in map(split_batch, batches)]
    tokens = torch.cat([ids.flatten().cpu() for ids, _ in pairs if ids is not None])
    labels = torch.cat([targets.flatten().cpu() for _, targets in pairs if targets is not None])
    logits = logits_of(predict(model, to_device(split_batch(batches[0])[0], device)))
    classes = logits.shape[-1]
    if logits.dim() != 3:
        return loss_of_batch(batches[0])
    is_target = labels != IGNORE_INDEX
    if torch.equal(tokens[is_target], labels[is_target]):
        return "causal_lm"
    shifted = torch.cat([next_tokens(ids).flatten().cpu() for ids, _ in pairs if ids is not None])
    is_inner = is_target & (shifted != IGNORE_INDEX)
    if torch.equal(shifted[is_inner], labels[is_inner]) or classes <= int(tokens.max()):
        return "cross_entropy"
    raise ValueError(
        f"loss='auto': the model returns {classes} classes for each token and makes no loss of its "
        "own, and the labels are neither its tokens nor the next ones; say what they are: "
        "loss='causal_lm' (unshifted, as Hugging Face gives them), 'cross_entropy' (one class for "
        "each token, in its own place), or a callable (model, batch) -> (B,) losses"
    )
