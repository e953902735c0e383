"""What is said of an architecture: right and how, wrong, refused."""

from __future__ import annotations

import math
from collections.abc import Sequence

MARGIN = 1e-3  # nats below a loss of 1 nat, a share of the loss above
WRONG, RIGHT, REFUSED, UNJUDGED = "WRONG", "right", "refused", "unjudged"

# The library's words for how it scored, and the table's; the first that occurs counts.
_HOW = {
    "one sample at a time": "alone",
    "one by one": "alone",
    "each alone": "alone",
    "each sample alone": "alone",
    "samples alone": "alone",
    "at most 1 sample": "alone",
    "like length": "by like length",
    "equal length": "by like length",
    "same length": "by like length",
    "samples padded": "padded",
    "packed": "packed",
}


def how(explanation: str) -> str:
    """How samples were laid out, by what `explain()` says."""
    sentence = explanation.lower().split("checked")[0]  # the check's own words say "alone" too
    return next((word for phrase, word in _HOW.items() if phrase in sentence), "padded")


def allowed_error(truth: float, plain_error: float | None = None) -> float:
    """How far a score may be off.

    Args:
        truth: the loss of the sample alone, in float32.
        plain_error: the largest error of the plain forward in a low precision; None for float32.
    """
    margin = MARGIN * max(1.0, abs(truth))
    return margin if plain_error is None else 2 * plain_error + MARGIN


def judge(
    losses: Sequence[float], truths: Sequence[float], plain_error: float | None = None
) -> tuple[str, float, list[int]]:
    """Return the verdict on scores, their largest error, and which samples are wrong.

    A score that is NaN where the truth is a number counts as infinitely wrong.
    """
    if len(losses) != len(truths):
        return WRONG, math.inf, list(range(len(truths)))
    errors = [
        math.inf if math.isnan(loss) else abs(loss - truth)
        for loss, truth in zip(losses, truths, strict=True)
    ]
    wrong = [
        index
        for index, (error, truth) in enumerate(zip(errors, truths, strict=True))
        if error > allowed_error(truth, plain_error)
    ]
    return (WRONG if wrong else RIGHT), max(errors), wrong
