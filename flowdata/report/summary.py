"""What a data set's losses look like, in figures."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.chunks import mean_of
from flowdata.targets.which_loss import LANGUAGE_LOSSES
from flowdata.weights import (
    Temperature,
    effective_sample_size,
    resolve_temperature,
    warn_of_useless_weights,
    weigh,
)

NATS = "nats"
FEWEST = 20  # samples with a loss; what fewer show may be chance
_LIKELIHOODS = (*LANGUAGE_LOSSES, "cross_entropy", "binary_cross_entropy")
QUANTILES = {
    "min": 0.0,
    "q10": 0.1,
    "q25": 0.25,
    "median": 0.5,
    "q75": 0.75,
    "q90": 0.9,
    "max": 1.0,
}


def summarize(
    losses: Tensor, counts: Tensor, temperature: Temperature = "median"
) -> dict[str, Any]:
    """Return the figures that describe losses and the weights made from them; JSON-like.

    Args:
        losses: (N,) floating, nats; NaN for samples without a loss, which are counted and then
            left out.
        counts: (N,) int64, targets of each sample.
        temperature: as in `resolve_temperature`.

    Returns:
        `samples`, `missing` and `targets` (counts), `loss` (mean and quantiles, nats),
        `temperature` and the rule it came from, `weight` (mean, smallest, largest),
        `effective_sample_size` and `effective_share`, its share of the samples with a loss.

    Raises:
        ValueError: no sample has a loss, or the temperature is unusable.

    Example:
        >>> import torch
        >>> figures = summarize(torch.tensor([0.5, 1.0, 4.0, torch.nan]), torch.ones(4))
        >>> figures["missing"], figures["temperature"], round(figures["effective_share"], 3)
        (1, 1.0, 0.652)
    """
    values = drop_missing(losses)
    of_losses = dict(zip(QUANTILES, quantiles(values, [*QUANTILES.values()]), strict=True))
    temperature_value = resolve_temperature(values, temperature)
    weights = weigh(values, temperature_value)
    warn_of_useless_weights(values, weights, temperature)
    effective = effective_sample_size(weights) if weights.any() else 0.0
    return {
        "samples": len(losses),
        "missing": len(losses) - len(values),
        "targets": int(counts.sum()),
        "loss": {"mean": mean_of(values), **of_losses},
        "temperature": temperature_value,
        "temperature_rule": _rule_name(temperature),
        "weight": {
            "mean": mean_of(weights),
            "min": weights.min().item(),
            "max": weights.max().item(),
        },
        "effective_sample_size": effective,
        "effective_share": effective / len(values),
    }


def unit_of(metadata: Mapping[str, Any]) -> str:
    """Return the unit of losses by their scores' metadata, "" for what is no likelihood's.

    Squared errors are in the square of their targets' unit, and a model's own loss or a user's
    may be anything.

    Example:
        >>> unit_of({"identity": {"loss": "mse"}}), unit_of({})
        ('', 'nats')
    """
    loss = (metadata.get("identity") or {}).get("loss")
    return NATS if loss is None or loss in _LIKELIHOODS else ""


def in_unit(name: str, unit: str) -> str:
    """Return the name of a figure with its unit.

    Example:
        >>> in_unit("loss", "nats"), in_unit("loss", "")
        ('loss (nats)', 'loss')
    """
    return f"{name} ({unit})" if unit else name


def quantiles(values: Tensor, shares: Sequence[float]) -> list[float]:
    """Return the quantiles of values, (N,) floating, as NumPy makes them of float64.

    Ten million values are not copied as float64 for it, but the two that lie next to each quantile.

    Example:
        >>> import torch
        >>> quantiles(torch.tensor([3.0, 1.0, 2.0, 5.0]), [0.0, 0.5])
        [1.0, 2.5]
    """
    wide = values.dtype in (torch.float32, torch.float64)
    places = [share * (len(values) - 1) for share in shares]
    pairs = [(int(place), min(int(place) + 1, len(values) - 1)) for place in places]
    ordered = np.partition((values if wide else values.float()).numpy(), sorted({*sum(pairs, ())}))
    return [
        float(np.quantile(ordered[[*pair]].astype(np.float64), place - pair[0]))
        for place, pair in zip(places, pairs, strict=True)
    ]


def extremes(losses: Tensor, top: int) -> tuple[list[int], list[int]]:
    """Return the indices of the `top` easiest and hardest samples, the most extreme first.

    Args:
        losses: (N,) floating, nats; samples whose loss is NaN are in neither list.
        top: the length of each list, or less where there are fewer samples.

    Example:
        >>> import torch
        >>> extremes(torch.tensor([0.5, 3.0, torch.nan, 0.1]), top=2)
        ([3, 0], [1, 0])
    """
    samples = (~losses.isnan()).nonzero().flatten()
    top = min(top, len(samples))
    easy, hard = (losses[samples].topk(top, largest=largest).indices for largest in (False, True))
    return samples[easy].tolist(), samples[hard].tolist()


def drop_missing(losses: Tensor) -> Tensor:
    """Return the losses of the samples that have one, in order.

    Raises:
        ValueError: no sample has a loss.
    """
    is_there = ~losses.isnan()
    values = losses if is_there.all() else losses[is_there]
    if len(values) == 0:
        raise ValueError(
            f"none of the {len(losses)} samples has a loss: check that the labels are not all "
            "ignored and that the model's outputs are finite"
        )
    return values


def _rule_name(temperature: Temperature) -> str:
    if callable(temperature):
        return getattr(temperature, "__name__", "callable")
    return temperature if isinstance(temperature, str) else "given"
