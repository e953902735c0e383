"""Losses in, weights out: w = exp(−loss / temperature) and how the temperature is chosen.

Everything here is pure: nothing is read from disk, nothing given is modified, and the same
losses give the same weights on every machine. Arithmetic is float64 inside.
"""

from __future__ import annotations

import math
import warnings
from collections.abc import Callable, Sequence
from typing import Literal, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Losses: TypeAlias = "Tensor | NDArray[np.floating] | Sequence[float]"
Temperature: TypeAlias = "float | str | Callable[[Tensor], float]"

TEMPERATURE_HELP = (
    "a positive float, 'median', 'mean', a quantile such as 'q0.25', "
    "an effective sample size such as 'ess0.5', or a callable losses -> float"
)
_NOT_NEGATIVE = {"losses": "FLOW needs losses >= 0; subtract their minimum first"}
_CHUNK = 1 << 22  # elements per float64 temporary: 32 MiB, whatever the number of samples


def flow_weights(
    losses: Losses,
    *,
    temperature: Temperature = "median",
    normalize: Literal["none", "mean"] = "none",
    max_weight: float | None = None,
) -> Tensor:
    """Return the FLOW weight exp(−loss / temperature) of every sample.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, Algorithm 1.

    Args:
        losses: (N,) floating, non-negative: each sample's loss under the frozen pre-trained
            model, in nats.
        temperature: a positive float, or a rule for `resolve_temperature`.
        normalize: ``"mean"`` divides the weights by their mean, so that they average 1 and a
            learning rate tuned for the unweighted loss keeps its scale.
        max_weight: caps the weights, after normalising.

    Returns:
        (N,) float32 on the device of `losses`, in [0, 1] unless normalised. Detached; `losses`
        is left as it is.

    Raises:
        TypeError: `losses` is not floating.
        ValueError: `losses` is empty, not 1-D, negative or non-finite (first index named), or
            the temperature is not usable.

    Example:
        >>> import torch
        >>> flow_weights(torch.tensor([0.0, 1.0, 2.0]), temperature=1.0)
        tensor([1.0000, 0.3679, 0.1353])
    """
    if normalize not in ("none", "mean"):
        raise ValueError(f"normalize must be 'none' or 'mean', got {normalize!r}")
    if max_weight is not None and not max_weight > 0:
        raise ValueError(f"max_weight must be positive, got {max_weight!r}")
    checked = check_values(losses)
    scale = -1.0 / resolve_temperature(checked, temperature)
    weights = torch.empty(checked.shape, dtype=torch.float32, device=checked.device)
    for out, part in zip(weights.split(_CHUNK), checked.split(_CHUNK), strict=True):
        out.copy_((part.double() * scale).exp_())
    if normalize == "mean":
        weights /= weights.mean(dtype=torch.float64).clamp_min(torch.finfo(torch.float32).tiny)
    return weights if max_weight is None else weights.clamp_(max=max_weight)


def resolve_temperature(losses: Losses, temperature: Temperature) -> float:
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
    checked = check_values(losses)
    rule = f"temperature={temperature!r}"
    if isinstance(temperature, str):
        value = _rule(temperature)(checked)
        if value <= 0 and (checked == 0).all():
            raise ValueError(
                f"{rule} is 0 because every loss is 0: the samples all count the same, "
                "pass any positive float as temperature"
            )
    elif callable(temperature):
        rule = f"temperature={getattr(temperature, '__name__', temperature)!r}"
        given = temperature(checked.clone())
        try:
            value = float(given)
        except (TypeError, ValueError):
            raise TypeError(f"{rule} must return a float, got {type(given).__name__}") from None
    elif isinstance(temperature, (int, float, np.number, Tensor)) and not isinstance(
        temperature, bool
    ):
        value = float(temperature)
    else:
        raise TypeError(f"temperature must be {TEMPERATURE_HELP}; got {type(temperature).__name__}")
    if not (math.isfinite(value) and value > 0):
        raise ValueError(
            f"temperature must be finite and > 0, but {rule} gives {value:g}; "
            "pass a positive float, 'mean' or a higher quantile such as 'q0.75'"
        )
    return value


def check_temperature(temperature: float | str) -> None:
    """Raise ValueError for a number or a rule that no losses could make right."""
    if isinstance(temperature, str):
        _rule(temperature)
    else:
        resolve_temperature([1.0], temperature)


def effective_sample_size(weights: Losses) -> float:
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
    checked = check_values(weights, name="weights")
    largest = checked.max().item()
    if largest == 0:
        raise ValueError("weights are all zero: an effective sample size needs one positive weight")
    return math.exp(_log_ess(checked, lambda part: part.div_(largest)))


def _rule(temperature: str) -> Callable[[Tensor], float]:
    """Parse a temperature given by name."""
    if temperature == "median":
        return lambda losses: _quantile(losses, 0.5)
    if temperature == "mean":
        return lambda losses: losses.mean(dtype=torch.float64).item()
    for prefix, solve in (("ess", _temperature_of_ess), ("q", _quantile)):
        if temperature.startswith(prefix):
            try:
                share = float(temperature.removeprefix(prefix))
            except ValueError:
                break
            if not (0 <= share <= 1 if prefix == "q" else 0 < share < 1):
                raise ValueError(f"temperature={temperature!r}: the share must lie between 0 and 1")
            return lambda losses: solve(losses, share)
    raise ValueError(f"temperature must be {TEMPERATURE_HELP}; got {temperature!r}")


def _quantile(losses: Tensor, share: float) -> float:
    """Linear-interpolation quantile; exact at any size, unlike torch.quantile above 2^24."""
    position = share * (losses.numel() - 1)
    low = math.floor(position)
    high = min(low + 1, losses.numel() - 1)
    middle = np.partition(losses.cpu().numpy(), (low, high))
    fraction = position - low
    return float(middle[low]) * (1 - fraction) + float(middle[high]) * fraction


def _temperature_of_ess(losses: Tensor, share: float) -> float:
    """Bisect on log temperature: the effective sample size never falls as it rises."""
    shifted = losses.double() - losses.min()  # the ratio is the same, and no exp underflows
    if shifted.max() == 0:
        raise ValueError("temperature='ess…' is not defined: every loss is the same")
    ties = int((shifted == 0).sum())
    wanted = share * shifted.numel()
    if wanted <= ties:
        raise ValueError(
            f"temperature='ess{share:g}' asks for an effective sample size of {wanted:g}, but "
            f"{ties} samples tie for the smallest loss; ask for more than {ties / len(shifted):g}"
        )

    def log_ess(log_temperature: float) -> float:
        return _log_ess(shifted, lambda part: part.mul_(-math.exp(-log_temperature)).exp_())

    low = math.log(shifted[shifted > 0].min().item()) - 10
    high = math.log(shifted.max().item()) + 40
    while high - low > 1e-13 * max(1.0, abs(low), abs(high)):
        middle = (low + high) / 2
        if not low < middle < high:
            break
        low, high = (middle, high) if log_ess(middle) < math.log(wanted) else (low, middle)
    return math.exp((low + high) / 2)


def _log_ess(values: Tensor, weigh: Callable[[Tensor], Tensor]) -> float:
    """log((Σw)² / Σw²) of w = weigh(values), summed in float64 chunks."""
    total = squares = 0.0
    for part in values.split(_CHUNK):
        weights = weigh(part.to(torch.float64, copy=True))
        total += weights.sum().item()
        squares += weights.square_().sum().item()
    return 2 * math.log(total) - math.log(squares)


def check_values(losses: Losses, name: str = "losses") -> Tensor:
    """Return values as a detached (N,) tensor, uncopied where possible; raise on bad ones."""
    with warnings.catch_warnings():  # torch warns of read-only memory maps; nothing is written
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            checked = torch.as_tensor(losses).detach()
        except (TypeError, ValueError, RuntimeError):
            hint = "; pass its .losses" if hasattr(losses, "losses") else ""
            raise TypeError(
                f"{name} must be a tensor, an array or a list of floats, got "
                f"{type(losses).__name__}{hint}"
            ) from None
    if not checked.is_floating_point():
        raise TypeError(f"{name} must be floating, got dtype {checked.dtype}")
    if checked.dim() != 1 or checked.numel() == 0:
        raise ValueError(f"{name} must be 1-D and not empty, got shape {tuple(checked.shape)}")
    if checked.dtype in (torch.bfloat16, torch.float16):
        checked = checked.float()  # numpy knows no bfloat16; the conversion is exact
    low, high = torch.aminmax(checked)  # one pass, and NaN comes through
    if low >= 0 and high < torch.inf:
        return checked
    for bad, what, remedy in (
        (~checked.isfinite(), "not finite", "find out why, or drop or zero-weight these samples"),
        (checked < 0, "negative", _NOT_NEGATIVE.get(name, "they must be >= 0")),
    ):
        if bad.any():
            first = int(bad.int().argmax())
            raise ValueError(
                f"{name}[{first}] is {checked[first].item()}: {int(bad.sum())} of "
                f"{checked.numel()} {name} are {what}; {remedy}"
            )
    return checked
