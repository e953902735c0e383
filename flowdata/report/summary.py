"""What a data set's losses look like, in figures."""

from __future__ import annotations

from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata.scores import Scores
from flowdata.weights import Temperature, effective_sample_size, flow_weights, resolve_temperature

QUANTILES = {
    "min": 0.0,
    "q10": 0.1,
    "q25": 0.25,
    "median": 0.5,
    "q75": 0.75,
    "q90": 0.9,
    "max": 1.0,
}


def summarize(scores: Scores, temperature: Temperature = "median") -> dict[str, Any]:
    """Return the figures that describe losses and the weights made from them; JSON-like.

    Args:
        scores: of N samples; those without a loss are counted and left out of all else.
        temperature: as in `resolve_temperature`.

    Returns:
        `samples`, `missing` and `targets` (counts), `loss` (mean and quantiles, nats),
        `temperature` and the rule it came from, `weight` (mean, smallest, largest),
        `effective_sample_size` and `effective_share`, its share of the samples with a loss.

    Raises:
        ValueError: no sample has a loss, or the temperature is unusable.

    Example:
        >>> import torch
        >>> figures = summarize(Scores(torch.tensor([0.5, 1.0, 4.0, float("nan")])))
        >>> figures["missing"], figures["temperature"], round(figures["effective_share"], 3)
        (1, 1.0, 0.652)
    """
    losses = present(scores)
    resolved = resolve_temperature(losses, temperature)
    weights = flow_weights(losses, temperature=resolved)
    effective = effective_sample_size(weights)
    values = np.quantile(losses.double().numpy(), list(QUANTILES.values()))
    return {
        "samples": len(scores),
        "missing": len(scores) - len(losses),
        "targets": int(scores.counts.sum()),
        "loss": {
            "mean": losses.mean(dtype=torch.float64).item(),
            **dict(zip(QUANTILES, values.tolist(), strict=True)),
        },
        "temperature": resolved,
        "temperature_rule": _rule_name(temperature),
        "weight": {
            "mean": weights.mean(dtype=torch.float64).item(),
            "min": weights.min().item(),
            "max": weights.max().item(),
        },
        "effective_sample_size": effective,
        "effective_share": effective / len(losses),
    }


def extremes(scores: Scores, top: int) -> tuple[list[int], list[int]]:
    """Return the indices of the `top` easiest and hardest samples, the most extreme first.

    Example:
        >>> import torch
        >>> extremes(Scores(torch.tensor([0.5, 3.0, float("nan"), 0.1])), top=2)
        ([3, 0], [1, 0])
    """
    present = (~scores.losses.isnan()).nonzero().flatten()
    losses = scores.losses[present]
    top = min(top, len(present))
    easy, hard = (losses.topk(top, largest=largest).indices for largest in (False, True))
    return present[easy].tolist(), present[hard].tolist()


def present(scores: Scores) -> Tensor:
    """Return the losses of the samples that have one; ValueError if none has."""
    losses = scores.losses[~scores.losses.isnan()]
    if len(losses) == 0:
        raise ValueError(
            f"none of the {len(scores)} samples has a loss: check that the labels are not all "
            "ignored and that the model's outputs are finite"
        )
    return losses


def _rule_name(temperature: Temperature) -> str:
    if callable(temperature):
        return getattr(temperature, "__name__", "callable")
    return temperature if isinstance(temperature, str) else "given"
