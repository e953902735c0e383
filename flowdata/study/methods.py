"""The methods of the field, by name, and their grids of learning rates."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from functools import partial

import torch
from torch import Tensor

from flowdata.scores import Scores
from flowdata.study.parts import anchor, averaging, hft, lora, mofo, weight_averaging
from flowdata.study.training import Method, Part
from flowdata.weights import effective_sample_size, flow_weights

STANDARD = "standard"  # the method that all others are compared with
LINEAR_PROBE = "linear probe"  # nothing but the head is fitted: where all fronts begin
_HOLD = 0.1


def flow(scores: Scores, temperature: str = "median", column: str = "loss") -> Tensor:
    """Return FLOW's sample weights, (N,)."""
    return scores.weights(temperature, column=column)


def even(scores: Scores) -> Tensor:
    """Return FLOW's mean weight for every sample, (N,): steps as small as FLOW's, and even."""
    return torch.full((len(scores),), scores.weights().mean().item())


def dro(scores: Scores) -> Tensor:
    """Return distributionally robust weights, exp(+loss / temperature) over their mean, (N,).

    They prefer hard samples, as FLOW prefers easy ones. The temperature is the one at which their
    effective sample size is that of FLOW's weights. At FLOW's own temperature the hardest sample
    would outweigh all the others together.
    """
    share = effective_sample_size(scores.weights()) / len(scores)
    # exp(loss / τ) is exp(−(top − loss) / τ) times a constant, which the mean takes out again.
    distances_to_top = scores.losses.max() - scores.losses
    return flow_weights(distances_to_top, temperature=f"ess{share:.9f}", normalize="mean")


_COMPANIONS: dict[str, tuple[Part, ...]] = {
    "l2": (anchor("l2", 1e-2),),
    "l1": (anchor("l1", 1e-4),),
    "LoRA": (lora(8),),
    "WiSE-FT": (weight_averaging(0.5),),
}
METHODS: dict[str, Method] = {
    STANDARD: Method(),
    LINEAR_PROBE: Method(trains=False),
    "FLOW": Method(flow),
    "FLOW, sampler": Method(flow, resample=True),
    **{name: Method(parts=parts) for name, parts in _COMPANIONS.items()},
    "MoFO": Method(parts=(mofo(0.15),)),
    "HFT": Method(parts=(hft(4),)),
    "DRO": Method(dro),
    "averaging": Method(parts=(averaging,)),
    **{
        f"FLOW + {name}": Method(flow, parts=_COMPANIONS[name])
        for name in ("l2", "LoRA", "WiSE-FT")
    },
    "output anchor": Method(hold=_HOLD),
    "FLOW + output anchor": Method(flow, hold=_HOLD),
}
TEMPERATURES: dict[str, Method] = {  # the dial between the linear probe and standard fine-tuning
    f"FLOW, {rule}": Method(partial(flow, temperature=rule))
    for rule in ("q0.1", "q0.25", "q0.75", "mean", "ess0.1", "ess0.25", "ess0.5", "ess0.9")
}


def grids(
    names: Iterable[str], rates: Iterable[float], methods: Mapping[str, Method] = METHODS
) -> dict[str, tuple[float, ...]]:
    """Return the learning rates to try for each method, as `run_study` takes them.

    A method that doesn't train has a single rate of 0.

    Raises:
        ValueError: a name is no method's.

    Example:
        >>> grids(["linear probe", "FLOW"], [0.01, 0.03])
        {'linear probe': (0.0,), 'FLOW': (0.01, 0.03)}
    """
    names, rates = list(names), tuple(rates)
    if unknown := [name for name in names if name not in methods]:
        raise ValueError(f"there is no method {unknown[0]!r}; there are {', '.join(methods)}")
    return {name: rates if methods[name].trains else (0.0,) for name in names}
