"""Which loss a model has, or a batch calls for."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Callable, Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import innermost
from flowdata.targets.labels import (
    IGNORE_INDEX,
    are_targets,
    describe_batch,
    split_batch,
    strings_for_targets,
)

LANGUAGE_LOSSES = ("causal_lm", "seq2seq_lm", "masked_lm")
PREDICTION_LOSSES = ("cross_entropy", "binary_cross_entropy", "mse")
OWN = "own"  # the model's own loss, whatever it is, one sample at a time
LOSSES = (*LANGUAGE_LOSSES, *PREDICTION_LOSSES, OWN)

# What floating targets are, of which two losses could be meant.
SINGLE_ONES = (
    "with a single 1 in each row: they can be one class for each sample or a yes or no for each "
    "class"
)

# The ends of Hugging Face's class names, and the `problem_type` of its classifiers' configurations.
_LOSS_OF_CLASS = {
    "ForCausalLM": "causal_lm",
    "LMHeadModel": "causal_lm",
    "ForMaskedLM": "masked_lm",
    "ForTokenClassification": "cross_entropy",
}
# Libraries that put a `forward` of their own round a model's, with the loss that that one makes.
_PASS_ON = ("accelerate.", "torch.", "transformers.", "trl.")
_CLASSIFIERS = ("ForSequenceClassification", "ForImageClassification")
_LOSS_OF_PROBLEM = {
    "regression": "mse",
    "single_label_classification": "cross_entropy",
    "multi_label_classification": "binary_cross_entropy",
}


def first_argument(function: Callable[..., Any]) -> str:
    """Return the name of a function's first argument, "" where its code tells none.

    It says what a user's loss takes: (model, batch), or (outputs, batch).

    Example:
        >>> first_argument(lambda outputs, batch: outputs.logits.mean(1))
        'outputs'
    """
    return next(iter(argument_names(function)), "")


def argument_names(function: Callable[..., Any]) -> list[str]:
    """Return the names of the arguments of a function, or of a module's forward; [] if unknown."""
    function = function.forward if isinstance(function, nn.Module) else function
    try:
        return list(inspect.signature(function).parameters)
    except (TypeError, ValueError):
        return []


def is_hugging_face(model: nn.Module) -> bool:
    """Return whether a model is one of Hugging Face's, whose layouts and configuration are known.

    A model of the user's own may have a `config` of its own.
    """
    # Whoever has a configuration of transformers has imported it.
    module = sys.modules.get("transformers.configuration_utils")
    config = getattr(innermost(model), "config", None)
    return module is not None and isinstance(config, module.PretrainedConfig)


def has_known_loss(model: nn.Module) -> bool:
    """Return whether a model's own loss is made by transformers' code, with nothing in its place.

    Somebody may have replaced its `forward` or its `loss_function`, or look on by a hook. That of
    accelerate or TRL calls the one before.
    """
    model = innermost(model)
    own = vars(model)
    forwards = [own[name] for name in ("forward", "_old_forward") if name in own]
    return (
        is_hugging_face(model)
        and type(model).__module__.startswith("transformers.models.")
        and "_loss_function" not in own
        and not model._forward_hooks
        and all(_is_of(_PASS_ON, forward, set()) for forward in forwards)
    )


def _is_of(libraries: tuple[str, ...], call: Any, seen: set[int]) -> bool:
    """Whether libraries made a function, a method or a partial one, and all that it holds."""
    function = getattr(call, "func", call)
    function = getattr(function, "__func__", function)
    if not inspect.isfunction(function) or id(function) in seen:
        return id(function) in seen
    seen.add(id(function))
    held = inspect.getclosurevars(function).nonlocals.values()
    return function.__globals__["__name__"].startswith(libraries) and all(
        _is_of(libraries, each, seen)
        for each in held
        if callable(each) and not isinstance(each, nn.Module | type)
    )


def loss_of_model(model: nn.Module) -> str | None:
    """Return the name of the loss that a Hugging Face model's class is made for.

    None where neither its name nor its configuration tells.
    """
    model = innermost(model)
    name = type(model).__name__
    for ending, loss in _LOSS_OF_CLASS.items():
        if name.endswith(ending):
            return loss
    config: Any = getattr(model, "config", None) if is_hugging_face(model) else None
    if name.endswith("ForConditionalGeneration") and config is not None:
        return "seq2seq_lm" if config.is_encoder_decoder else "causal_lm"
    if name.endswith(_CLASSIFIERS) and config is not None:
        problem = "regression" if config.num_labels == 1 else None
        return _LOSS_OF_PROBLEM.get(config.problem_type or problem or "")
    return None


def loss_of_batch(batch: Any) -> str:
    """Return the name of the loss that a batch of samples calls for.

    Token batches are causal language modelling, integer targets cross-entropy, (B, L) bools and
    floating targets that are all 0 or 1 (or −100 or NaN, which are none) binary cross-entropy,
    other floating targets the mean squared error.

    Raises:
        ValueError: there are no targets, or they can be read in two ways: rows with a single 1 (one
            class, or a yes or no for each); values from 0 to 1 (smoothed answers, or numbers); −1,
            0 and 1. The message says what to pass.
    """
    inputs, targets = split_batch(batch)
    if targets is None or (targets.dim() == 2 and _same_shape(inputs, targets)):
        if isinstance(inputs, Mapping) and "input_ids" in inputs:
            return "causal_lm"
        if strings := strings_for_targets(batch):
            raise ValueError(f"loss='auto': {strings}")
        raise ValueError(
            "loss='auto' found no targets in the batch: samples must be (input, target) pairs or "
            f"dicts with 'labels', got {describe_batch(batch)}; pass loss=callable(model, batch)"
        )
    if targets.dtype == torch.bool and targets.dim() > 1:
        return "binary_cross_entropy"
    if not targets.is_floating_point():
        return "cross_entropy"
    if targets.dim() == 2 and targets.shape[1] > 1 and are_probabilities(targets):
        if ((targets == 0) | (targets == 1)).all():
            raise ValueError(
                f"loss='auto' found floating targets {SINGLE_ONES}; pass loss='cross_entropy' or "
                "'binary_cross_entropy'"
            )
        return "cross_entropy"
    is_single = targets[0].numel() == 1
    return _loss_of_numbers(targets[are_targets(targets)], is_single=is_single)


def _loss_of_numbers(values: Tensor, *, is_single: bool) -> str:
    """The loss of floating targets (n,) without marks of no target; is_single: a sample has one."""
    if ((values == 0) | (values == 1)).all():
        return "binary_cross_entropy"
    # A single answer that is smoothed has one of two values; of several answers, mixing makes more.
    could_be_answers = len(values.unique()) <= 2 or not is_single
    if could_be_answers and ((values >= 0) & (values <= 1)).all():
        raise ValueError(
            "loss='auto' found floating targets that all lie between 0 and 1: they can be answers, "
            "yes or no, that are smoothed, or any numbers; pass loss='binary_cross_entropy' or "
            "'mse'"
        )
    if ((values.abs() == 1) | (values == 0)).all():
        raise ValueError(
            "loss='auto' found floating targets that are all −1, 0 or 1: they can be answers, yes, "
            "no or unsure, or any numbers; pass loss='mse', or give answers as 0 and 1, and "
            f"{IGNORE_INDEX} where nothing counts, with loss='binary_cross_entropy'"
        )
    return "mse"


def are_probabilities(targets: Tensor) -> bool:
    """Return whether the rows of (B, C) targets are distributions over classes."""
    sums = targets.float().sum(1)
    # The parts of 1 are rounded, each by half an epsilon at most: in bfloat16 that is more.
    rounding = torch.finfo(targets.dtype).eps if targets.is_floating_point() else 0.0
    is_one = torch.allclose(sums, torch.ones_like(sums), atol=max(1e-3, rounding))
    return bool((targets >= 0).all()) and is_one


def _same_shape(inputs: Any, targets: Tensor) -> bool:
    ids = inputs.get("input_ids") if isinstance(inputs, Mapping) else None
    return isinstance(ids, Tensor) and ids.shape == targets.shape
