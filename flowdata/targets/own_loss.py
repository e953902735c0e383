"""A model's own loss: what it returns for a batch with labels, less the terms it names apart.

Where a model makes a loss of its own, that loss says what its labels mean: shifted or not, with
class weights or smoothing, of classes or of numbers.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.models.calling import innermost

# Terms that a mixture of experts adds to its loss, by their names in the output, and the names that
# their factors have in configurations.
_NAMED_TERMS = {
    "aux_loss": ("router_aux_loss_coef", "aux_loss_coef"),
    "z_loss": ("router_z_loss_coef", "z_loss_coefficient"),
}


class Reading(NamedTuple):
    """One of the values that a model's own loss can be meant to have.

    Attributes:
        value: the loss without the terms.
        factors: of the terms that were taken off, by their names in the output.
    """

    value: float
    factors: Mapping[str, float]


def own_losses(model: nn.Module, output: Any, *, is_labelled: bool = True) -> list[float]:
    """Return the values that a model's own loss can be meant to have; none if it made none.

    They begin with what it returned: its loss, or each number where it returned several without
    names. Where the output names further terms, those values follow that the loss has without them,
    with the factor that the configuration tells and with a factor of 1.

    Args:
        model: the model, whose configuration is looked at.
        output: what it returned for a batch with labels.
        is_labelled: whether the model took them, see `own_loss_of`.

    Example:
        >>> own_losses(nn.Identity(), {"loss": torch.tensor(2.0), "aux_loss": torch.tensor(0.5)})
        [2.0, 1.5]
    """
    return [each.value for each in readings(model, output, is_labelled=is_labelled)]


def readings(model: nn.Module, output: Any, *, is_labelled: bool = True) -> list[Reading]:
    """Return the values of `own_losses`, each with the factors of the terms taken off."""
    values = [Reading(each.item(), {}) for each in _losses(output, is_labelled=is_labelled)]
    if not values:
        return []
    for factors in (term_factors(model), dict.fromkeys(_NAMED_TERMS, 1.0)):
        terms = named_terms(output, factors)
        if isinstance(terms, Tensor):
            value = values[0].value - terms.item()
            if value not in [each.value for each in values]:
                values.append(Reading(value, factors))
    return values


def own_loss_alone(model: nn.Module, output: Any, *, is_labelled: bool = True) -> float | None:
    """Return the loss that a model made without the terms that its output names; None for no loss.

    Args:
        model: the model, whose configuration tells the factors of the terms.
        output: what it returned for a batch with labels.
        is_labelled: whether the model took them, see `own_loss_of`.

    Raises:
        ValueError: the output names a term, and nothing tells its factor; or it holds several
            numbers without names.

    Example:
        >>> own_loss_alone(nn.Identity(), {"loss": torch.tensor(2.0)})
        2.0
    """
    loss = own_loss_of(output, is_labelled=is_labelled)
    if loss is None:
        return None
    factors = _told_factors(model)
    for name in _NAMED_TERMS.keys() - factors.keys():
        if term := named_terms(output, {name: 1.0}):
            raise ValueError(
                f"loss='own': the model's output names {name} ({float(term):.4g}) beside its loss, "
                "and nothing tells whether, and by which factor, the loss holds it; return it "
                "under another name where it holds none of it, or pass loss=callable(model, batch)"
            )
    return loss.item() - float(named_terms(output, factors))


def own_loss_of(output: Any, *, is_labelled: bool = True) -> Tensor | None:
    """Return the loss that a model made, 0-d or of one element; None if it made none.

    A model that took no labels makes a loss only where it says so by that name: what else it
    returns are predictions, which are single numbers too where a sample has one output.

    Args:
        output: what the model returned.
        is_labelled: whether it was given labels, and took them.

    Raises:
        ValueError: it returned several numbers without names, such as an accuracy beside the loss.
    """
    losses = _losses(output, is_labelled=is_labelled)
    if len(losses) > 1:
        raise ValueError(
            f"the model returns {len(losses)} numbers without names "
            f"({', '.join(f'{each.item():.4g}' for each in losses)}), and any of them can be its "
            "loss; return a dict with `loss`"
        )
    return losses[0] if losses else None


def _losses(output: Any, *, is_labelled: bool) -> list[Tensor]:
    """What may be the loss in an output: that of this name, or without names any number."""
    named = _field(output, "loss")
    entries = [named] if named is not None else _unnamed_losses(output) if is_labelled else []
    return [
        each
        for each in entries
        if isinstance(each, Tensor) and each.is_floating_point() and each.numel() == 1
    ]


def _unnamed_losses(output: Any) -> list[Any]:
    """What may be the loss in an output without names: its 0-d tensors, else the first entry.

    Hugging Face's order without names is (loss, logits); others return (logits, loss), or further
    numbers, such as an accuracy, on any side of the loss.
    """
    entries = [output] if isinstance(output, Tensor) and output.dim() == 0 else output
    if not isinstance(entries, tuple | list) or hasattr(entries, "_fields"):
        return []
    numbers = [each for each in entries if isinstance(each, Tensor) and each.dim() == 0]
    return numbers or [each for each in entries[:1] if isinstance(each, Tensor) and each.dim() == 1]


def named_terms(output: Any, factors: Mapping[str, float]) -> Tensor | float:
    """Return the sum of the terms that an output names apart, times their factors; 0 for none."""
    terms = [(factor, _field(output, name)) for name, factor in factors.items()]
    return sum(
        (factor * each for factor, each in terms if isinstance(each, Tensor) and each.numel() == 1),
        start=0.0,
    )


def term_factors(model: nn.Module) -> dict[str, float]:
    """Return the factors of the terms by their names; 1 where the configuration tells none."""
    return dict.fromkeys(_NAMED_TERMS, 1.0) | _configured_factors(_text_config(model))


def _told_factors(model: nn.Module) -> dict[str, float]:
    """The factors that are sure; encoder-decoders apply theirs before they name the terms."""
    config = _text_config(model)
    is_encoder_decoder = getattr(config, "is_encoder_decoder", False)
    return {} if is_encoder_decoder else _configured_factors(config)


def _configured_factors(config: Any) -> dict[str, float]:
    return {
        term: float(getattr(config, name) or 0.0)
        for term, names in _NAMED_TERMS.items()
        for name in names
        if hasattr(config, name)
    }


def _text_config(model: nn.Module) -> Any:
    config: Any = getattr(innermost(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


def _field(output: Any, name: str) -> Any:
    if isinstance(output, Mapping):
        return output.get(name)
    return getattr(output, name, None)


def least_difference(loss: str, named_losses: Sequence[float | None]) -> float:
    """Return how far two losses may be apart by rounding, however small they are.

    Args:
        loss: the loss's name. Squared errors have a unit of their own.
        named_losses: those of a few batches by this name, None or NaN where there is none.

    Example:
        >>> least_difference("cross_entropy", [0.5]), f"{least_difference('mse', [1e-9, None]):g}"
        (0.0001, '1e-11')
    """
    if loss != "mse":
        return 1e-4
    largest = max((each for each in named_losses if each is not None and each == each), default=1.0)
    return 1e-2 * min(largest, 1e-2)


def agrees(own_loss: float, named_loss: float, dtype: torch.dtype, least: float = 1e-4) -> bool:
    """Return whether two losses of the same logits are the same but for rounding.

    A model may add its own loss up in the dtype that it runs in.

    Args:
        own_loss: the model's.
        named_loss: that by a loss's name.
        dtype: that the model runs in.
        least: see `least_difference`.
    """
    if own_loss != own_loss or named_loss != named_loss:  # NaN: a sample without a target
        return own_loss != own_loss and named_loss != named_loss
    eps = torch.finfo(dtype).eps if dtype.itemsize < 4 else 1e-5
    return abs(own_loss - named_loss) <= least + 4 * eps * abs(named_loss)
