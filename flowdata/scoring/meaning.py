"""Meaning: what the labels of a job are, told by the model's own loss on a few samples.

The model is given a few samples, each alone and with its labels, and the loss by name that equals
its own is taken (flowdata/targets/meaning.py).
"""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from functools import partial
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata._common.unreadable import some_readable
from flowdata.models.as_loaded import as_loaded
from flowdata.models.calling import (
    call_in_order,
    call_with,
    innermost,
    is_unexpected,
    parameters_of,
    takes_field,
)
from flowdata.models.positions import check_positions
from flowdata.models.precision import dtype_of
from flowdata.models.tensors import cloned, to_device
from flowdata.scoring.collate import Collate
from flowdata.scoring.kinds import (
    LONGEST_CHECKED,
    differing,
    has_target,
    is_short,
    tokens_of,
)
from flowdata.scoring.language.inputs import labels_of, last_tokens
from flowdata.targets.labels import LABEL_FIELDS, label_field, split_batch, split_unread
from flowdata.targets.meaning import (
    agreed_name,
    all_agree,
    check_are_logits,
    losses_by_name,
    name_by_labels,
)
from flowdata.targets.own_loss import own_loss_alone, own_losses
from flowdata.targets.predictions import logits_of, predict
from flowdata.targets.which_loss import (
    LANGUAGE_LOSSES,
    OWN,
    has_known_loss,
    is_hugging_face,
    loss_of_model,
)

_TO_CHOOSE, _TO_ASK = 8, 3  # samples of which the model is asked for its own loss
_MANY = 64  # samples from which the kind of targets is told, and on which an unknown loss is asked
_MOST_READ = 1024  # samples that are looked through for classes that none of these has
_TEXTS = 16  # of which such a loss is asked


def decide_loss(
    model: nn.Module, dataset: Any, collate: Collate, device: torch.device, *, is_known: bool
) -> str:
    """Return the name of the loss that labels are for: one of `LOSSES`, or ``"own"``.

    Args:
        model: the model in eval mode, on the device.
        dataset: whose labels.
        collate: makes a batch of samples.
        device: where the model takes its inputs.
        is_known: whether transformers' code makes the model's own loss (`has_known_loss`).

    Raises:
        ValueError: nothing tells, or too much does; the message says what `loss` could be.
    """
    batches = [collate([sample]) for sample in _few_samples(dataset)]
    for batch in batches:
        _check_positions(model, batch)
    batches = [part_to_compare(model, batch) for batch in batches]
    calls = _calls_with_labels(model, batches, device)
    makes_loss = any(own_losses(model, output, is_labelled=took) for output, took in calls)
    if makes_loss and not is_known:
        further = further_to_ask(dataset, collate)
        if more := _calls_with_labels(model, further, device):
            batches, calls = [*batches, *further], [*calls, *more]
    outputs = [output for output, _ in calls]
    own_values = [own_losses(model, output, is_labelled=took) for output, took in calls]
    if not any(own_values):
        many = partial(some_readable, dataset, _MANY)
        return _name_without_own_loss(model, batches, lambda: collate(many()), device)

    def values_of(name: str) -> list[float | None]:
        return [_named_loss(name, *pair) for pair in zip(outputs, batches, strict=True)]

    dtype = dtype_of(model)
    name = agreed_name(model, own_values, values_of, dtype)
    if name is not None and (
        (name in LANGUAGE_LOSSES and is_hugging_face(model))  # they make it in ways of their own
        or all_agree(name, _named_without_labels(model, name, batches, device), own_values, dtype)
    ):
        return name
    first = next(call for call, values in zip(calls, own_values, strict=True) if values)
    loss = own_loss_alone(model, first[0], is_labelled=first[1])
    reason = "has no name here" if name is None else "needs the labels in its forward"
    logger.warning(
        "loss='auto': the model's own loss (%.4g on a sample) %s, so it is taken as it is, "
        "loss='own', one sample at a time: several times as slow",
        loss,
        reason,
    )
    return OWN


def _few_samples(dataset: Any) -> list[Any]:
    """A few samples with targets that differ, of which a model is asked for its own loss."""
    samples = some_readable(dataset, _TO_CHOOSE)
    if not any(map(has_target, samples)):
        samples = some_readable(dataset, _MANY)
    samples = list(filter(has_target, samples)) or samples
    return [samples[place] for place in differing(samples, _TO_ASK)]


def further_to_ask(dataset: Any, collate: Collate) -> list[Any]:
    """Return more samples, each collated alone, to ask a loss of somebody's own about.

    It may weigh some classes or samples alone: so the first sample of each class is among them, as
    far as these are met. Texts have many targets each, so that fewer do.
    """
    samples = [
        each for each in some_readable(dataset, _MANY) if is_short(each) and has_target(each)
    ]
    if any(map(tokens_of, samples)):
        samples = samples[:: -(-len(samples) // _TEXTS)]
    samples += _of_other_classes(dataset, samples)
    batches = []
    for sample in samples:
        with suppress(Exception):  # the run will meet it and say so
            batches.append(collate([sample]))
    return batches


def _of_other_classes(dataset: Any, samples: Sequence[Any]) -> list[Any]:
    """The first sample of each class that none of some samples has, from all over a data set."""
    known = {_class_of(sample) for sample in samples}
    if None in known:
        return []
    others: dict[Hashable, Any] = {}
    for index in range(0, len(dataset), -(-len(dataset) // _MOST_READ)):
        with suppress(Exception):  # the run will meet it and say so
            sample = dataset[index]
            label = _class_of(sample)
            if label not in known and label is not None and is_short(sample):
                others.setdefault(label, sample)
        if len(others) >= _TEXTS:
            break
    return list(others.values())


def _class_of(sample: Any) -> Hashable:
    """A sample's label where it is a single number, else None."""
    label: Any = None
    if isinstance(sample, Mapping):
        name = label_field(sample)
        label = None if name is None else sample[name]
    elif isinstance(sample, tuple | list) and len(sample) == 2:
        label = sample[1]
    if isinstance(label, Tensor | np.ndarray | np.generic):
        label = label.item() if np.prod(label.shape) == 1 else None
    return label if isinstance(label, bool | int | float) else None


def _calls_with_labels(
    model: nn.Module, batches: Sequence[Any], device: torch.device
) -> list[tuple[Any, bool]]:
    """The outputs for batches with their labels, and whether the model took these."""
    try:
        copies = (cloned(batch) for batch in batches)  # a forward may change it
        return [_call_with_labels(model, to_device(batch, device)) for batch in copies]
    except (AttributeError, IndexError, RuntimeError, TypeError, ValueError):
        # Labels that are no classes, or a batch of another layout: the run's own checks say which.
        return []


def _name_without_own_loss(
    model: nn.Module, batches: Sequence[Any], many: Callable[[], Any], device: torch.device
) -> str:
    """The name of the loss that labels are for where the model makes none: see `decide_loss`."""
    inputs = [to_device(split_batch(batch)[0], device) for batch in batches]
    name = loss_of_model(model) or name_by_labels(
        batches, many, lambda: logits_of(predict(model, inputs[0]))
    )
    with suppress(IndexError, RuntimeError, TypeError):  # the run's own checks say more of these
        if name == "binary_cross_entropy":
            inputs = [to_device(split_batch(many())[0], device)]
        if name in ("cross_entropy", "binary_cross_entropy"):
            check_are_logits(name, [predict(model, each) for each in inputs])
    return name


def _named_without_labels(
    model: nn.Module, name: str, batches: Sequence[Any], device: torch.device
) -> list[float | None]:
    """The losses by a name of what a model makes without labels, as scoring calls it.

    A model may need its labels, give the last logits alone without them, or change the logits by
    them, as a margin does; then the loss by name is another one.
    """
    try:
        inputs = [to_device(split_batch(batch)[0], device) for batch in batches]
        outputs = [predict(model, each) for each in inputs]
    except (TypeError, ValueError, AttributeError):
        return [None] * len(batches)
    return [_named_loss(name, *pair) for pair in zip(outputs, batches, strict=True)]


def output_with_labels(model: nn.Module, batch: Any) -> Any:
    """Return a model's output for a batch with its labels, as its own `forward` takes them.

    Rotary frequencies are those of the model as it was loaded, and are left as they were.
    """
    return _call_with_labels(model, batch)[0]


def losses_with_labels(model: nn.Module, batch: Any) -> list[float]:
    """Return the values that the own loss of such an output can be meant to have (`own_losses`)."""
    output, took_labels = _call_with_labels(model, batch)
    return own_losses(model, output, is_labelled=took_labels)


def part_to_compare(model: nn.Module, batch: Any) -> Any:
    """Return what of a sample, collated alone, its loss by name and the model's own are made of.

    It is all of it but for long texts, all of whose logits transformers' losses make in float32.
    These losses weigh all tokens alike, so that the end of a text tells what they mean. A loss of
    somebody's own may weigh the first tokens, or count those that are no targets.
    """
    return last_tokens(batch, LONGEST_CHECKED) if has_known_loss(model) else batch


def loss_with_labels(model: nn.Module, batch: Any) -> float | None:
    """Return the own loss of such an output (`own_loss_alone`)."""
    output, took_labels = _call_with_labels(model, batch)
    return own_loss_alone(model, output, is_labelled=took_labels)


def _call_with_labels(model: nn.Module, batch: Any) -> tuple[Any, bool]:
    """The output for a batch with its labels, and whether the model took these."""
    with as_loaded(model), _same_problem(model):
        inputs, targets = split_unread(batch)
        if not isinstance(batch, Mapping):
            name = _label_argument(model)
            if targets is None or name is None:
                return call_in_order(model, inputs), False
            arguments = inputs if isinstance(inputs, tuple | list) else [inputs]
            return model(*arguments, **{name: targets}), True
        if targets is None and "input_ids" in batch:
            batch = {**batch, "labels": labels_of(batch, "causal_lm")}
            targets = batch["labels"]
        _check_positions(model, batch)
        name = _label_argument(model) or label_field(batch)
        if targets is None or name is None or not takes_field(model, name):
            return call_with(model, inputs, use_cache=False), False
        try:
            return call_with(model, {**inputs, name: targets}, use_cache=False), True
        except TypeError as error:
            if not is_unexpected(name, error):
                raise
            # A wrapper that takes anything, round a model that takes no labels.
            return call_with(model, inputs, use_cache=False), False


def _check_positions(model: nn.Module, batch: Any) -> None:
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    if isinstance(ids, Tensor):
        check_positions(model, ids.shape[-1])


def _label_argument(model: nn.Module) -> str | None:
    """The argument of a model's `forward` that takes labels, None where none has their name."""
    parameters = parameters_of(model)
    return next((name for name in LABEL_FIELDS if name in parameters), None)


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
    inputs, targets = split_unread(batch)
    if targets is None and isinstance(inputs, Mapping) and "input_ids" in inputs:
        targets = labels_of(batch, "causal_lm")
    if not isinstance(targets, Tensor):
        return None
    try:
        logits = logits_of(output).cpu()
        logits = logits if name == "mse" else logits.float()
        values = losses_by_name(name, logits, targets.cpu()).values
    except (ValueError, RuntimeError, IndexError):
        return None
    return float(values.mean()) if len(values) else float("nan")
