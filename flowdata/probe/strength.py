"""The search for the strength of a probe's penalty, on held-out folds."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata._common.progress import progress_bar
from flowdata.probe.problem import LOSSES, HeadProblem

_WEAKEST, _STRONGEST = -6, 2  # powers of ten
_TOLERANCE = 1e-4  # is enough to rank the strengths
_HELD_OUT = 1000  # samples, and of fewer samples the folds are drawn up to three times
_SLACK = 1.0  # nats over all held-out samples
_FALLBACK = 1.0


def strengths_for(samples: int, width: int) -> list[float]:
    """Return the strengths to try, from strong to weak.

    From 100 to 1e-6; where features outnumber samples the strongest is as many times larger, in
    powers of ten, because the logits are sums over all features.

    Args:
        samples: N.
        width: D, the number of features.

    Example:
        >>> strengths_for(1000, 64)
        [100.0, 10.0, 1.0, 0.1, 0.01, 0.001, 0.0001, 1e-05, 1e-06]
        >>> strengths_for(50, 4000)[:2]
        [10000.0, 1000.0]
    """
    strongest = _STRONGEST + max(0, math.ceil(math.log10(width / samples)))
    return [float(f"1e{power}") for power in range(strongest, _WEAKEST - 1, -1)]


def best_strength(
    problem: HeadProblem,
    strengths: list[float],
    strata: Tensor,
    folds: int,
    *,
    progress: bool = False,
) -> float:
    """Return the strength with the smallest held-out loss; a warning says if it is the last one.

    All are tried, as the loss may have several minima. Between them the loss is taken for a
    parabola of the strength's logarithm. A stronger penalty is preferred where it costs less than
    one nat in all: one surprise among new samples costs a head that is too sure of itself more.

    Args:
        problem: the problem on all samples, which are shuffled here with a fixed seed.
        strengths: from strong to weak.
        strata: (N,) int64, what the folds hold equal shares of. A sample alone in its stratum is
            never held out, as nothing could be learnt about it from the others.
        folds: number of held-out folds; with fewer samples there are as many as samples.
        progress: shows it where the search takes more than a few seconds.
    """
    held_out = _folds(strata, folds)
    if not held_out:
        logger.warning(
            "fewer than two classes have a second sample, so that none can be held out: the probe "
            "takes strength=%g; give strength= to choose it",
            _FALLBACK,
        )
        return _FALLBACK
    losses = [0.0] * len(strengths)
    is_training = torch.ones(len(strata), dtype=torch.bool, device=strata.device)
    fits, name = len(held_out) * len(strengths), "head: choosing its strength"
    with progress_bar(fits, name, "fits", shown=progress, patient=True) as advance:
        for indices in held_out:
            is_training[indices] = False
            training, testing = problem.rows(is_training.nonzero()[:, 0]), problem.rows(indices)
            is_training[indices] = True
            solution = problem.start()
            for place, strength in enumerate(strengths):
                # Each starts from the solution of the one before: they lie close together.
                solution = training.solve(solution, strength, _TOLERANCE)
                losses[place] += testing.mean_loss(solution) * len(indices)
                advance(1)
    slack = _SLACK if problem.loss is not LOSSES["mse"] else 0.0
    repeats = sum(map(len, held_out)) / len(torch.cat(held_out).unique())
    least = min(losses)
    # Where the loss nearly vanishes, a nat is many times all of it: half of it is the most then.
    bound = least + min(slack * repeats, abs(least) / 2)
    best = next(place for place, loss in enumerate(losses) if loss <= bound)
    if 0 < best < len(strengths) - 1 and losses[best] == least:
        return strengths[best] * 10 ** -_lowest_place(*losses[best - 1 : best + 2])
    _warn_at_the_edge(best, strengths)
    return strengths[best]


def _folds(strata: Tensor, folds: int) -> list[Tensor]:
    """The indices that each fold holds out: every stratum is dealt to the folds in turn.

    The folds of few samples are drawn several times, because how they fall would decide. There
    are none where samples of one class alone could be held out: they would choose for that class.
    """
    _, strata, counts = strata.unique(return_inverse=True, return_counts=True)
    if (counts > 1).sum() < min(2, len(counts)):
        return []
    usable = int(counts[counts > 1].sum())
    repeats = 1 if usable <= folds else min(3, max(1, _HELD_OUT // usable))
    shuffle = torch.Generator().manual_seed(0)
    held_out = []
    for _ in range(repeats):
        order = torch.randperm(len(strata), generator=shuffle).to(strata.device)
        order = order[strata[order].argsort(stable=True)]
        order = order[counts[strata[order]] > 1]
        held_out += [order[fold::folds] for fold in range(min(folds, usable))]
    return held_out


def _lowest_place(left: float, middle: float, right: float) -> float:
    """Where the parabola through three losses at −1, 0 and 1 is lowest, in [−0.5, 0.5]."""
    curvature = left - 2 * middle + right
    return (left - right) / (2 * curvature) if curvature > 0 else 0.0


def _warn_at_the_edge(best: int, strengths: list[float]) -> None:
    """Say that a strength beyond those tried may be better."""
    if best == 0:
        logger.warning(
            "strength=%g, the strongest tried, has the smallest held-out loss: the features may "
            "tell nothing of the targets; check both, or give a larger strength",
            strengths[best],
        )
    if best == len(strengths) - 1:
        logger.warning(
            "strength=%g, the weakest tried, has the smallest held-out loss: the targets may "
            "follow from the features exactly; give a smaller strength for a closer head still",
            strengths[best],
        )
