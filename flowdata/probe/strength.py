"""The search for the strength of a probe's penalty, on held-out folds."""

from __future__ import annotations

import torch

from flowdata.probe.problem import HeadProblem

STRENGTHS = tuple(10.0**power for power in range(0, -7, -1))  # tried from strong to weak
_TOLERANCE = 1e-4  # is enough to rank the strengths


def best_strength(problem: HeadProblem, folds: int) -> float:
    """Return the strength with the smallest held-out loss, from strong to weak until it rises.

    Args:
        problem: the problem on all samples, which are shuffled here with a fixed seed.
        folds: K, the number of held-out folds; the loss is their mean.
    """
    shuffle = torch.Generator().manual_seed(0)
    order = torch.randperm(len(problem.features), generator=shuffle).to(problem.features.device)
    held_out = order.tensor_split(folds)
    others = [torch.cat([*held_out[:fold], *held_out[fold + 1 :]]) for fold in range(folds)]
    solutions = [problem.start()] * folds
    best, least_loss = STRENGTHS[0], float("inf")
    for strength in STRENGTHS:
        loss = 0.0
        for fold in range(folds):
            # Each strength starts from the solution of the one before: they lie close together.
            solutions[fold] = problem.rows(others[fold]).solve(
                solutions[fold], strength, _TOLERANCE
            )
            loss += problem.rows(held_out[fold]).mean_loss(solutions[fold]) / folds
        if loss >= least_loss:
            break
        best, least_loss = strength, loss
    return best
