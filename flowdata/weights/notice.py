"""Warnings of a rule's weights that are of no use for the losses, and of given ones like losses."""

from __future__ import annotations

from collections.abc import Mapping
from types import MappingProxyType
from typing import Literal

import torch
from torch import Tensor

from flowdata._common.chunks import mean_of
from flowdata._common.notices import warn_once
from flowdata.weights.formula import weigh
from flowdata.weights.temperature import Temperature, resolve_temperature, rule_name

_SMALLEST_MEAN = 1e-3  # weights of a smaller mean leave training next to nothing to learn from
_TINY = torch.finfo(torch.float32).tiny
_FEW = 10  # so few equal losses, of a toy or a single batch, say nothing about a data set
# The rules that may do better, the one that users are best served by first.
_RULES = ("ess0.5", "median", "mean", "ess0.9", "ess0.99", "ess0.999")
_REMEDIES = MappingProxyType({rule: rule for rule in _RULES})
_LARGE_MEAN = 1.5  # FLOW's weights are at most 1, and normalised ones 1 in the mean
_LOOKED_AT = 1000  # weights among which equal ones are looked for


def warn_of_useless_weights(
    losses: Tensor,
    weights: Tensor,
    temperature: Temperature,
    *,
    is_normalized: bool = False,
    name: str = "losses",
    unit: str = "samples",
    remedies: Mapping[str, str] = _REMEDIES,
) -> None:
    """Warn where weights vanish or tell no samples apart, and name a rule whose weights do not.

    It is for those who make a data set's weights, once, and not for what is made in every step.

    Args:
        losses: (N,) floating, non-negative; NaN for samples without a loss, which are left out.
        weights: (N,) float32 in [0, 1], made from the losses, before any normalising.
        temperature: the rule they were made by.
        is_normalized: whether the weights will be divided by their mean. A small mean is then no
            trouble, as long as float32 holds such weights with all their digits.
        name: what messages call the losses: ``"losses"``, or what takes their place.
        unit: what the losses are of, for messages.
        remedies: the rules that may be recommended, each with the rule that it comes to for these
            losses.
    """
    present = ~losses.isnan()
    if not present.all():
        losses, weights = losses[present], weights[present]
    trouble = _trouble_of(losses, weights)
    mean = mean_of(weights)
    if trouble is None or (trouble == "vanish" and is_normalized and mean > _TINY):
        return
    rule, units = rule_name(temperature), f"{len(losses):,} {unit}"
    about = f"weights: {trouble}, {rule}, {name} of {units}"
    if trouble == "same losses":
        warn_once(
            f"the {name} of all {units} are {losses[0].item():.6g}, so that their weights are "
            "the same under every rule and change nothing; check the model and the labels",
            about=about,
        )
        return
    if trouble == "vanish":
        what = f"have a mean of {mean:.3g}, so that training on them would hardly move the model"
        cure = "do not vanish"
    else:
        what = f"are all the same, although the {name} differ, so that they change nothing"
        cure = "differ"
    better = _better_rule(losses, remedies)
    remedy = f"; pass temperature={better!r}, whose weights {cure}" if better else ""
    warn_once(f"temperature={rule}: the weights of the {units} {what}{remedy}", about=about)


def warn_of_likely_losses(weights: Tensor) -> None:
    """Warn where the weights that a user gives look like losses.

    Those of classes or of sources may have any scale, and are told by the few values they repeat.

    Args:
        weights: (N,) floating, finite, non-negative.
    """
    mean = mean_of(weights)
    first = weights[:_LOOKED_AT]
    if len(weights) < _FEW or mean < _LARGE_MEAN or 2 * len(first.unique()) < len(first):
        return
    warn_once(
        f"the {len(weights):,} weights given have a mean of {mean:.3g}, as losses have, where "
        "FLOW's are at most 1; if they are losses, so that the hardest samples would count most, "
        "pass the scores themselves, or flow_weights(losses)",
        about="weights that look like losses",
    )


def _trouble_of(
    losses: Tensor, weights: Tensor
) -> Literal["vanish", "same weights", "same losses"] | None:
    """What is wrong with weights, if anything is."""
    if mean_of(weights) < _SMALLEST_MEAN:
        return "vanish"
    if len(weights) == 1 or weights.min() < weights.max():
        return None
    if losses.min() < losses.max():
        return "same weights"
    return "same losses" if len(losses) >= _FEW else None


def _better_rule(losses: Tensor, remedies: Mapping[str, str]) -> str | None:
    """The first remedy whose weights for these losses are in no trouble, beyond the losses' own."""
    for name, rule in remedies.items():
        try:
            weights = weigh(losses, resolve_temperature(losses, rule))
        except ValueError:  # ties for the smallest loss, or a median of 0
            continue
        if _trouble_of(losses, weights) in (None, "same losses"):
            return name
    return None
