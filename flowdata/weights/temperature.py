"""The temperature of weights: a number, a rule that picks one from the losses, or a function."""

from __future__ import annotations

import math
import sys
from collections.abc import Callable
from typing import TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowdata._common.chunks import mean_of
from flowdata._common.real_numbers import as_float
from flowdata._common.values import Values, check_values
from flowdata.weights.sample_size import log_sample_size

Temperature: TypeAlias = "float | str | Callable[[Tensor], float]"

TEMPERATURE_HELP = (
    "a positive float, 'median', 'mean', a quantile such as 'q0.25', "
    "an effective sample size such as 'ess0.5', or a callable losses -> float"
)
_LOWEST = -700.0  # logarithm of the lowest temperature that is tried; exp(+700) is a float


class RelativeTemperature(float):
    """A temperature whose weights are relative to a loss, as those of ``"ess…"`` are.

    It is a float like any other, and carries that loss to wherever weights are made of it: the
    weight of a sample is exp(−(loss − smallest_loss) / temperature), and 1 for smaller losses.
    Arithmetic gives a plain float.

    Args:
        value: the temperature, in the unit of the losses.
        smallest_loss: the loss whose weight is 1, usually the smallest of the data.

    Example:
        >>> import torch
        >>> temperature = resolve_temperature(torch.tensor([7.0, 7.1, 7.2, 7.3]), "ess0.5")
        >>> temperature.smallest_loss
        7.0
    """

    smallest_loss: float

    def __new__(cls, value: float, smallest_loss: float = 0.0) -> RelativeTemperature:
        """Return the float `value`, with its loss."""
        temperature = super().__new__(cls, value)
        temperature.smallest_loss = smallest_loss
        return temperature


def resolve_temperature(losses: Values, temperature: Temperature) -> float:
    """Return the temperature that a rule picks for these losses.

    The rules of the data keep weights from vanishing: the smallest loss weighs at least exp(−1), or
    1 under ``"ess…"``. Two settings may leave all weights at 0, which `flow_weights` warns of: a
    float, and what a callable returns.

    Args:
        losses: (N,) floating, non-negative, of any size (2^24 elements and more included).
        temperature: a positive real number (any type of one, 0-d tensors and arrays included);
            ``"median"`` (mean of the two middle values when N is even, as in NumPy, where
            `torch.median` takes the lower one); ``"mean"``; ``"q0.25"``, any quantile,
            interpolated linearly; ``"ess0.5"``, the temperature at which the effective sample
            size of the weights is that share of N, whose weights are relative to the smallest
            loss; or a callable from the losses to such a number.

    Returns:
        A finite float > 0, in the unit of the losses; of ``"ess…"`` a `RelativeTemperature`,
        which knows the smallest loss.

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
        return _check_positive(_by_name(values, temperature), rule_name(temperature))
    if callable(temperature):
        return _by_callable(values, temperature)
    return positive_number(temperature)


def positive_number(temperature: object) -> float:
    """Return a temperature that is given as a number, as a float.

    Raises:
        TypeError: it is no real number.
        ValueError: it is not finite or not positive.

    Example:
        >>> positive_number(np.float32(0.5))
        0.5
    """
    number = as_float(temperature)
    if number is None:
        shape = getattr(temperature, "shape", ())
        of_shape = f" of shape {tuple(shape)}" if len(shape) else ""
        raise TypeError(
            f"temperature must be {TEMPERATURE_HELP}; got {type(temperature).__name__}{of_shape}"
        )
    return _check_positive(number, rule_name(temperature))


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError for a number or a rule that no losses could make right."""
    if isinstance(temperature, str):
        _parse_rule(temperature)
    else:
        positive_number(temperature)


def rule_name(temperature: object) -> str:
    """Return a temperature as messages show it: a rule in quotes, a function by its name."""
    if callable(temperature):
        return repr(getattr(temperature, "__name__", type(temperature).__name__))
    number = None if isinstance(temperature, str) else as_float(temperature)
    return repr(temperature) if number is None else repr(float(number))


def _check_positive(value: float, rule: str) -> float:
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"temperature must be finite and > 0, but temperature={rule} gives {value:g}; "
            "pass a positive float, 'mean' or a higher quantile such as 'q0.75'"
        )
    return value


def _by_name(losses: Tensor, name: str) -> float:
    """The temperature of a rule given by name; 0 is left for the caller to refuse."""
    value = _parse_rule(name)(losses)
    if value <= 0 and (losses == 0).all():
        raise ValueError(
            f"temperature={name!r} is 0 because every loss is 0: the samples all count the same, "
            "pass any positive float as temperature"
        )
    return value


def _by_callable(losses: Tensor, function: Callable[[Tensor], float]) -> float:
    """The temperature that a user's function returns."""
    rule = rule_name(function)
    value = function(losses.clone())  # a copy, which the function may write to
    number = as_float(value)
    if number is None:
        raise TypeError(f"temperature={rule} must return a float, got {type(value).__name__}")
    return _check_positive(number, rule)


def _parse_rule(name: str) -> Callable[[Tensor], float]:
    """The rule of a name: 'median', 'mean', 'q' or 'ess' with a share."""
    if name == "median":
        return lambda losses: _quantile(losses, 0.5)
    if name == "mean":
        return _mean
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


def _in_order(losses: Tensor) -> Tensor:
    """Losses in rising order on the CPU: their sums do not depend on the order that they came in.

    The last bit of a sum would, and with it that of weights.
    """
    return torch.from_numpy(np.sort(losses.cpu().numpy()))


def _mean(losses: Tensor) -> float:
    """The mean, which is positive and finite wherever one of the losses is positive."""
    losses = _in_order(losses)
    mean = mean_of(losses)
    if math.isinf(mean):  # the sum overflows, not the mean
        largest = losses.max().item()
        mean = largest * mean_of(losses / largest)
    if mean == 0 and losses.any():  # it lies below the smallest float
        mean = math.ulp(0.0)
    return mean


def _quantile(losses: Tensor, share: float) -> float:
    """Linear-interpolation quantile; exact at any size, unlike torch.quantile above 2^24."""
    position = share * (losses.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, losses.numel() - 1)
    ordered = np.partition(losses.cpu().numpy(), (low, high))  # in order at low and high only
    below, above, fraction = float(ordered[low]), float(ordered[high]), position - low
    if below == above or fraction == 0:  # the sum of two parts would lose some of a subnormal
        return below
    # Between 0 and a subnormal loss the sum rounds to 0, which would be refused.
    return max(below * (1 - fraction) + above * fraction, math.ulp(0.0))


def _temperature_of_ess(losses: Tensor, share: float) -> RelativeTemperature:
    """The temperature whose weights have an effective sample size of a share of N.

    The effective sample size never falls as the temperature rises, from the number of samples
    that tie for the smallest loss up to N: the temperature is found by bisection.
    """
    # Taking off the smallest loss scales all weights alike, which leaves the sample size as it
    # is; the largest weight is then 1, so that they cannot all underflow to 0.
    ordered = _in_order(losses)
    smallest = ordered[0].item()
    excess = ordered.double() - smallest
    target_size = share * len(excess)
    _check_ess_is_reachable(excess, share, target_size)
    nearest, largest = excess[excess > 0][0].item(), excess[-1].item()
    # The unit is a power of two, by which a division is exact: in it the excess is at most 2, and
    # no temperature over- or underflows, however large or small the losses are.
    unit = 2.0 ** (math.frexp(largest)[1] - 1)
    excess /= unit

    def log_size(log_temperature: float) -> float:
        return log_sample_size(excess, lambda part: part.mul_(-math.exp(-log_temperature)).exp_())

    # Temperatures lie orders of magnitude apart, so their logarithm is halved. At the low end
    # all weights but those of the ties are 0 in float64, at the high end all are 1.
    low = max(math.log(nearest) - math.log(unit) - 10, _LOWEST)
    high = math.log(largest / unit) + 40
    while high - low > 1e-13 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        if not low < middle < high:  # no float lies between them any more
            break
        low, high = (middle, high) if log_size(middle) < math.log(target_size) else (low, middle)
    temperature = unit * math.exp((low + high) / 2)
    if low == _LOWEST or not sys.float_info.min <= temperature < math.inf:
        raise ValueError(
            f"temperature='ess{share:g}' lies beyond what a float holds, for losses that differ by "
            f"up to {largest:g}; rescale the losses"
        )
    return RelativeTemperature(temperature, smallest)


def _check_ess_is_reachable(excess: Tensor, share: float, target_size: float) -> None:
    """Raise ValueError where ties for the smallest loss alone make a larger sample size."""
    if excess.max() == 0:
        raise ValueError(
            "temperature='ess…' is not defined: every loss is the same, and so is every weight; "
            "pass any positive float as temperature"
        )
    ties = int((excess == 0).sum())
    if target_size <= ties:
        raise ValueError(
            f"temperature='ess{share:g}' asks for an effective sample size of {target_size:g}, but "
            f"{ties} samples tie for the smallest loss; ask for more than {ties / len(excess):g}"
        )
