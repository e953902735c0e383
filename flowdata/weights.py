"""Losses in, weights out: w = exp(−loss / temperature), and how the temperature is chosen.

Everything here is pure: no function reads from disk or modifies its arguments, and the same
losses give the same weights on every machine. Arithmetic is float64 inside.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from typing import Literal, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowdata._common.values import Values, check_values

Normalize: TypeAlias = Literal["none", "mean"]
Temperature: TypeAlias = "float | str | Callable[[Tensor], float]"

TEMPERATURE_HELP = (
    "a positive float, 'median', 'mean', a quantile such as 'q0.25', "
    "an effective sample size such as 'ess0.5', or a callable losses -> float"
)
_CHUNK = 1 << 22  # elements per float64 temporary: 32 MiB, whatever the number of samples


def flow_weights(
    losses: Values,
    *,
    temperature: Temperature = "median",
    normalize: Normalize = "none",
    max_weight: float | None = None,
) -> Tensor:
    """Return the FLOW weight exp(−loss / temperature) of every sample.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, Algorithm 1.

    Args:
        losses: (N,) floating, non-negative: each sample's loss under the frozen pre-trained
            model, in nats.
        temperature: a positive float, or a rule for `resolve_temperature`.
        normalize: as in `shape_weights`; ``"none"`` leaves the weights as they are.
        max_weight: as in `shape_weights`; None sets no cap.

    Returns:
        (N,) float32 on the device of `losses`, in [0, 1] unless normalised. Detached; `losses`
        is left as it is.

    Raises:
        TypeError: `losses` is not floating.
        ValueError: `losses` is empty, not 1-D, negative or non-finite (first index named), or
            the temperature, `normalize` or `max_weight` is not usable.

    Example:
        >>> import torch
        >>> flow_weights(torch.tensor([0.0, 1.0, 2.0]), temperature=1.0)
        tensor([1.0000, 0.3679, 0.1353])
    """
    values = check_values(losses)
    scale = -1.0 / resolve_temperature(values, temperature)
    weights = torch.empty(values.shape, dtype=torch.float32, device=values.device)
    for out, part in zip(weights.split(_CHUNK), values.split(_CHUNK), strict=True):
        out.copy_((part.double() * scale).exp_())
    return shape_weights(weights, normalize=normalize, max_weight=max_weight)


def shape_weights(
    weights: Tensor, *, normalize: Normalize = "none", max_weight: float | None = None
) -> Tensor:
    """Return the weights normalised, then capped; as they are where neither is asked for.

    Args:
        weights: (N,) floating, non-negative.
        normalize: ``"mean"`` divides the weights by their mean, so that they average 1 and a
            learning rate tuned for the unweighted loss keeps its scale. Samples of weight 0
            count in the mean.
        max_weight: the largest weight that remains; larger ones become this one.

    Returns:
        (N,) of the dtype of `weights`: a new tensor, or `weights` itself where nothing changes.

    Raises:
        ValueError: `normalize` is neither ``"none"`` nor ``"mean"``, or `max_weight` is not
            positive.

    Example:
        >>> import torch
        >>> shape_weights(torch.tensor([1.0, 0.5, 0.0]), normalize="mean", max_weight=1.5)
        tensor([1.5000, 1.0000, 0.0000])
    """
    if normalize not in ("none", "mean"):
        raise ValueError(f"normalize must be 'none' or 'mean', got {normalize!r}")
    if max_weight is not None and not max_weight > 0:
        raise ValueError(f"max_weight must be positive, got {max_weight!r}")
    if normalize == "mean":
        # The bound keeps weights that are all 0 at 0, instead of 0 / 0.
        mean = weights.mean(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny)
        weights = weights / mean
    return weights if max_weight is None else weights.clamp(max=max_weight)


def resolve_temperature(losses: Values, temperature: Temperature) -> float:
    """Return the temperature that a rule picks for these losses.

    Args:
        losses: (N,) floating, non-negative, of any size (2^24 elements and more included).
        temperature: a positive float (returned as it is); ``"median"`` (mean of the two middle
            values when N is even); ``"mean"``; ``"q0.25"``, any quantile, interpolated
            linearly; ``"ess0.5"``, the temperature at which the effective sample size of the
            weights is that share of N; or a callable from the losses to a float.

    Returns:
        A finite float > 0, in the unit of the losses.

    Raises:
        TypeError: `losses` is not floating, or `temperature` is none of the above.
        ValueError: `losses` is empty, not 1-D, negative or non-finite (first index named), or
            the rule gives a value that is not positive.

    Example:
        >>> import torch
        >>> resolve_temperature(torch.tensor([3.0, 1.0, 2.0, 8.0]), "median")
        2.5
    """
    values = check_values(losses)
    if isinstance(temperature, str):
        rule, value = repr(temperature), _by_name(values, temperature)
    elif callable(temperature):
        rule = repr(getattr(temperature, "__name__", temperature))
        value = _by_callable(values, temperature, rule)
    elif _is_number(temperature):
        rule, value = repr(temperature), float(temperature)
    else:
        raise TypeError(f"temperature must be {TEMPERATURE_HELP}; got {type(temperature).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"temperature must be finite and > 0, but temperature={rule} gives {value:g}; "
            "pass a positive float, 'mean' or a higher quantile such as 'q0.75'"
        )
    return value


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError for a number or a rule that no losses could make right."""
    if isinstance(temperature, str):
        _parse_rule(temperature)
    else:
        resolve_temperature([1.0], temperature)


def effective_sample_size(weights: Values) -> float:
    """Return the effective sample size (Σw)² / Σw², between 1 and N.

    Source: Kish, Survey Sampling (1965).

    Args:
        weights: (N,) floating, non-negative, not all zero; any scale.

    Raises:
        TypeError: `weights` is not floating.
        ValueError: `weights` is empty, not 1-D, negative, non-finite or all zero.

    Example:
        >>> import torch
        >>> effective_sample_size(torch.tensor([1.0, 1.0, 0.0, 0.0]))
        2.0
    """
    values = check_values(weights, name="weights")
    largest = values.max().item()
    if largest == 0:
        raise ValueError("weights are all zero: an effective sample size needs one positive weight")
    return math.exp(_log_ess(values, lambda part: part.div_(largest)))


def _is_number(temperature: object) -> bool:
    return isinstance(temperature, int | float | np.number | Tensor) and not isinstance(
        temperature, bool
    )


def _by_name(losses: Tensor, name: str) -> float:
    """The temperature of a rule given by name; 0 is left for the caller to refuse."""
    value = _parse_rule(name)(losses)
    if value <= 0 and (losses == 0).all():
        raise ValueError(
            f"temperature={name!r} is 0 because every loss is 0: the samples all count the same, "
            "pass any positive float as temperature"
        )
    return value


def _by_callable(losses: Tensor, function: Callable[[Tensor], float], rule: str) -> float:
    """The temperature that a user's function returns."""
    value = function(losses.clone())  # a copy, which the function may write to
    try:
        return float(value)
    except (TypeError, ValueError):
        raise TypeError(
            f"temperature={rule} must return a float, got {type(value).__name__}"
        ) from None


def _parse_rule(name: str) -> Callable[[Tensor], float]:
    """The rule of a name: 'median', 'mean', 'q' or 'ess' with a share."""
    if name == "median":
        return lambda losses: _quantile(losses, 0.5)
    if name == "mean":
        return lambda losses: losses.mean(dtype=torch.float64).item()
    prefix = "ess" if name.startswith("ess") else "q"
    try:
        share = float(name.removeprefix(prefix)) if name.startswith(prefix) else None
    except ValueError:
        share = None
    if share is None:
        raise ValueError(f"temperature must be {TEMPERATURE_HELP}; got {name!r}")
    # The ends are quantiles, the minimum and the maximum; no temperature reaches either as ess.
    if not (0 <= share <= 1 if prefix == "q" else 0 < share < 1):
        raise ValueError(f"temperature={name!r}: the share must lie between 0 and 1")
    solve = _quantile if prefix == "q" else _temperature_of_ess
    return lambda losses: solve(losses, share)


def _quantile(losses: Tensor, share: float) -> float:
    """Linear-interpolation quantile; exact at any size, unlike torch.quantile above 2^24."""
    position = share * (losses.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, losses.numel() - 1)
    ordered = np.partition(losses.cpu().numpy(), (low, high))  # in order at low and high only
    fraction = position - low
    return float(ordered[low]) * (1 - fraction) + float(ordered[high]) * fraction


def _temperature_of_ess(losses: Tensor, share: float) -> float:
    """The temperature whose weights have an effective sample size of a share of N.

    The effective sample size never falls as the temperature rises, from the number of samples
    that tie for the smallest loss up to N: the temperature is found by bisection.
    """
    # Taking off the smallest loss scales all weights alike, which leaves the sample size as it
    # is; the largest weight is then 1, so that they cannot all underflow to 0.
    excess = losses.double() - losses.min()
    target_size = share * len(excess)
    _check_ess_is_reachable(excess, share, target_size)

    def log_ess(log_temperature: float) -> float:
        return _log_ess(excess, lambda part: part.mul_(-math.exp(-log_temperature)).exp_())

    # Temperatures lie orders of magnitude apart, so their logarithm is halved. At the low end
    # all weights but those of the ties are 0 in float64, at the high end all are 1.
    low = math.log(excess[excess > 0].min().item()) - 10
    high = math.log(excess.max().item()) + 40
    while high - low > 1e-13 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        if not low < middle < high:  # no float lies between them any more
            break
        low, high = (middle, high) if log_ess(middle) < math.log(target_size) else (low, middle)
    return math.exp((low + high) / 2)


def _check_ess_is_reachable(excess: Tensor, share: float, target_size: float) -> None:
    """Raise ValueError where ties for the smallest loss alone make a larger sample size."""
    if excess.max() == 0:
        raise ValueError("temperature='ess…' is not defined: every loss is the same")
    ties = int((excess == 0).sum())
    if target_size <= ties:
        raise ValueError(
            f"temperature='ess{share:g}' asks for an effective sample size of {target_size:g}, but "
            f"{ties} samples tie for the smallest loss; ask for more than {ties / len(excess):g}"
        )


def _log_ess(values: Tensor, weigh: Callable[[Tensor], Tensor]) -> float:
    """log((Σw)² / Σw²) of w = weigh(values), summed in float64 chunks."""
    total = squares = 0.0
    for part in values.split(_CHUNK):
        weights = weigh(part.to(torch.float64, copy=True))
        total += weights.sum().item()
        squares += weights.square_().sum().item()
    return 2 * math.log(total) - math.log(squares)
