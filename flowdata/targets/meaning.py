"""Meaning: what labels are, told by the loss that a model makes of them itself.

The rule is one for scoring and for training. A loss by name is taken if it equals the model's own
loss of the same outputs: first the loss that the model's class is named for (which_loss.py), then
the others. Where a model makes no loss, its class's name and the labels have to tell, and where
they leave two meanings open the user has to say which.

    scoring     a few samples, each alone          scoring/meaning.py
    training    the first batch                    integrations/first_batch.py
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import innermost, output_layer_of
from flowdata.targets.labels import IGNORE_INDEX, next_tokens, split_batch, token_ids_of
from flowdata.targets.own_loss import agrees, least_difference
from flowdata.targets.prediction_losses import binary_cross_entropy, cross_entropy, squared_error
from flowdata.targets.target_losses import TargetLosses
from flowdata.targets.which_loss import PREDICTION_LOSSES, loss_of_batch, loss_of_model

_MANY = 8  # numbers that hardly lie between 0 and 1 by chance


def agreed_name(
    model: nn.Module,
    own_values: Sequence[Sequence[float]],
    values_of: Callable[[str], Sequence[float | None]],
    dtype: torch.dtype,
) -> str | None:
    """Return the loss by name that is the model's own; None where none is.

    Args:
        model: the model; its class's name says which loss is tried first.
        own_values: for each batch, the values that the model's own loss can be meant to have
            (`own_losses`); none where it made no loss.
        values_of: name -> the loss by that name of each batch, None where shapes don't fit it.
        dtype: that the model runs in.
    """
    by_class = loss_of_model(model)
    names = filter(None, (by_class, *_names(model)))
    return next((n for n in names if all_agree(n, values_of(n), own_values, dtype)), None)


def _names(model: nn.Module) -> tuple[str, ...]:
    """The losses by name, that first which a model with such an output would be said to have."""
    config: Any = getattr(innermost(model), "config", None)
    if getattr(config, "is_encoder_decoder", False):
        return ("seq2seq_lm", "causal_lm", *PREDICTION_LOSSES)
    if output_layer_of(model) is not None:
        return ("causal_lm", "masked_lm", *PREDICTION_LOSSES)
    return ("causal_lm", *PREDICTION_LOSSES)  # labels in their own places are classes


def all_agree(
    name: str,
    named: Sequence[float | None],
    own_values: Sequence[Sequence[float]],
    dtype: torch.dtype,
) -> bool:
    """Return whether a loss by name is the model's own on every batch, and a number on one."""
    pairs = list(zip(named, own_values, strict=True))
    least = least_difference(name, named)
    is_known = any(value is not None and value == value for value in named)  # NaN: no target
    return is_known and all(
        value is not None and any(agrees(each, value, dtype, least) for each in values)
        for value, values in pairs
        if values
    )


def losses_by_name(
    name: str, logits: Tensor, labels: Tensor, *, classes_last: bool | None = None
) -> TargetLosses:
    """Return the losses of a batch's targets by a loss's name, in nats or squared units.

    Args:
        name: one of `LANGUAGE_LOSSES` or `PREDICTION_LOSSES`.
        logits: floating; (B, T, V) for language models.
        labels: as the loss takes them; unshifted for ``"causal_lm"``.
        classes_last: logits of ``"cross_entropy"`` are (B, …, C) where both orders fit. None takes
            that for (B, T) classes.

    Raises:
        ValueError: shapes that don't fit the loss, or a label that is none of it.
    """
    if name == "binary_cross_entropy":
        return binary_cross_entropy(logits, labels)
    if name == "mse":
        return squared_error(logits, labels)
    if name == "cross_entropy":
        if classes_last is None:
            classes_last = labels.dim() == 2 and not labels.is_floating_point()
        return cross_entropy(logits, labels, classes_last=classes_last)
    if logits.dim() != 3 or labels.dim() != 2 or labels.is_floating_point():
        raise ValueError(
            f"loss={name!r} needs logits (B, T, V) and integer labels (B, T), got shapes "
            f"{tuple(logits.shape)} and {tuple(labels.shape)}"
        )
    targets = next_tokens(labels) if name == "causal_lm" else labels
    return cross_entropy(logits, targets, classes_last=True)


def name_by_labels(
    batches: Sequence[Any], many: Callable[[], Any], logits_of_first: Callable[[], Tensor]
) -> str:
    """Return the loss by name that labels call for, of a model that makes none.

    Args:
        batches: with their labels.
        many: makes a batch of more samples.
        logits_of_first: makes the model's logits of the first batch.

    Raises:
        ValueError: nothing tells, or too much does.
    """
    pairs = [_tokens_and_labels(batch) for batch in batches]
    has_label_of_each_token = all(
        ids is not None
        and labels is not None
        and labels.shape == ids.shape
        and not labels.is_floating_point()
        for ids, labels in pairs
    )
    if has_label_of_each_token:
        return _name_by_tokens(batches, logits_of_first())
    return loss_of_batch(many())


def check_are_logits(loss: str, logits: Sequence[Tensor]) -> None:
    """Raise ValueError if outputs are probabilities, whose loss would be another one.

    Args:
        loss: the loss by name that labels call for.
        logits: what the model returned for a few samples, (B, C, …) or (B, …, C) each; of a yes or
            no, which add up to nothing, for more of them.

    Example:
        >>> logits = torch.tensor([[0.0, 2.0, -1.0]])
        >>> check_are_logits("cross_entropy", [logits])
        >>> check_are_logits("cross_entropy", [logits.softmax(1)])  # doctest: +ELLIPSIS
        Traceback (most recent call last):
        ValueError: loss='auto': the model returns probabilities ...
    """
    if loss == "cross_entropy" and all(map(_add_up_to_one, logits)):
        layer, remedy = "softmax", "nll_loss(model(x).log(), y, reduction='none')"
    elif loss == "binary_cross_entropy" and _lie_between_0_and_1(logits):
        layer, remedy = "sigmoid", "binary_cross_entropy(model(x), y, reduction='none')"
    else:
        return
    raise ValueError(
        f"loss='auto': the model returns probabilities (of {tuple(logits[0].shape)} numbers all "
        f"are as a {layer} makes them), and loss={loss!r} takes logits. Let it return what its "
        f"{layer} is given, or pass loss=callable(model, batch) -> (B,) losses, such as {remedy}; "
        f"loss={loss!r} takes them for logits all the same"
    )


def _lie_between_0_and_1(logits: Sequence[Tensor]) -> bool:
    """Whether many numbers are probabilities, as a few logits may be by chance."""
    values = torch.cat([each.flatten() for each in logits])
    return len(values) >= _MANY and bool(((values >= 0) & (values <= 1)).all())


def _add_up_to_one(logits: Tensor) -> bool:
    """Whether numbers are at least 0 and add up to 1 over an axis of several classes."""
    if logits.dim() < 2 or not logits.is_floating_point() or bool((logits < 0).any()):
        return False
    axes = {axis for axis in (1, -1) if logits.shape[axis] > 1}
    sums = [logits.float().sum(axis) for axis in axes]
    return any(torch.allclose(each, torch.ones_like(each), atol=1e-2, rtol=0) for each in sums)


def _tokens_and_labels(batch: Any) -> tuple[Tensor | None, Tensor | None]:
    """A batch's token ids, (B, T), None where it has none; and its labels."""
    inputs, labels = split_batch(batch)
    return token_ids_of(inputs), labels


def _name_by_tokens(batches: Sequence[Any], logits: Tensor) -> str:
    """The loss of one label for each token.

    Labels that repeat their own tokens are those of a causal model; a model could copy them
    otherwise. Labels that are the next token have been shifted already. A model with fewer classes
    than there are tokens can't predict tokens.
    """
    pairs = list(map(_tokens_and_labels, batches))
    tokens = torch.cat([ids.flatten().cpu() for ids, _ in pairs if ids is not None])
    labels = torch.cat([each.flatten().cpu() for _, each in pairs if each is not None])
    classes = logits.shape[-1]
    if logits.dim() != 3:
        return loss_of_batch(batches[0])
    if logits.shape[::2] == pairs[0][1].shape != logits.shape[:2]:  # type: ignore[union-attr]
        return "cross_entropy"  # PyTorch's (B, C, T), which is no language model's
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
        "each token, in its own place), or a callable that returns (B,) losses"
    )
