"""Meaning: what the labels of a job are, told by the model's own loss on a few samples.

The model is given a few samples, each alone and with its labels, and the loss by name that equals
its own is taken (flowdata/targets/meaning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata.models.calling import call_with, innermost
from flowdata.models.positions import check_positions
from flowdata.models.rope import loaded_frequencies
from flowdata.models.tensors import to_device
from flowdata.scoring.language.inputs import labels_of
from flowdata.targets.labels import split_batch
from flowdata.targets.meaning import agreed_name, losses_by_name, name_by_labels
from flowdata.targets.own_loss import own_losses
from flowdata.targets.predictions import logits_of, predict
from flowdata.targets.which_loss import loss_of_model


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
        first = split_batch(batches[0])[0]
        return loss_of_model(innermost(model)) or name_by_labels(
            batches, many, lambda: logits_of(predict(model, to_device(first, device)))
        )

    def values_of(name: str) -> list[float | None]:
        return [_named_loss(name, *pair) for pair in zip(outputs, batches, strict=True)]

    dtype = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
    if (name := agreed_name(model, own_values, values_of, dtype)) is not None:
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


def _named_loss(name: str, output: Any, batch: Any) -> float | None:
    """A sample's loss by a name, None where shapes don't fit it."""
    inputs, targets = split_batch(batch)
    if targets is None and isinstance(inputs, Mapping) and "input_ids" in inputs:
        targets = labels_of(batch, "causal_lm")
    if targets is None:
        return None
    try:
        values = losses_by_name(name, logits_of(output).float().cpu(), targets.cpu()).values
    except (ValueError, RuntimeError, IndexError):
        return None
    return float(values.mean()) if len(values) else float("nan")
