"""What validation scores are: losses in nats or accuracies, and in which unit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Literal

from flowdata._common.notices import say_once, warn_once

Kind = Literal["loss", "accuracy"]
Validation = Literal["auto", Kind]
_ROUNDING = 1e-6  # below 0, of a loss in float32 of what is certain
_MOST_NATS = 15.0  # log of three million tokens: who guesses among all of a vocabulary loses less
_LEAST_PERCENT = 12.0  # accuracies in % up to here look like the losses of classifiers


def kind_and_unit(
    validation: Validation, scores: Sequence[float], *, is_of_language: bool
) -> tuple[Kind, float]:
    """Return what scores are, and by what they are divided: accuracies are in % if one is above 1.

    Args:
        validation: what they are; ``"auto"`` takes those of language models for losses, others
            for accuracies, and says so.
        scores: one of each run; those that are no finite numbers tell nothing.
        is_of_language: whether they are of language models.

    Raises:
        ValueError: `validation` is none of these, or scores can't be what it says.
    """
    if validation not in ("auto", "loss", "accuracy"):
        raise ValueError(f"validation must be 'auto', 'loss' or 'accuracy', got {validation!r}")
    scores = [score for score in scores if math.isfinite(score)]
    kind: Kind = "loss" if is_of_language else "accuracy"
    if validation == "auto":
        _check_guess(kind, scores)
        _say_guess(kind)
    else:
        kind = validation
    if kind == "accuracy":
        _check_accuracies(scores)
    else:
        _check_losses(scores)
    if validation != "auto":
        _warn_of_odd(kind, scores)
    return kind, 100.0 if kind == "accuracy" and max(scores, default=0.0) > 1 else 1.0


def _say_guess(kind: Kind) -> None:
    taken = "losses in nats (less" if kind == "loss" else "accuracies (more"
    other = "accuracy" if kind == "loss" else "loss"
    say_once(
        f"validation scores are taken for {taken} is better); pass validation={kind!r} to "
        f"confirm it, or {other!r} where they are of the other kind"
    )


def _odd_score(kind: Kind, scores: Sequence[float]) -> float | None:
    """The best score, if even that is hardly one of its kind."""
    best = min(scores, default=0.0) if kind == "loss" else max(scores, default=0.0)
    is_odd = best > _MOST_NATS if kind == "loss" else 1 < best <= _LEAST_PERCENT
    return best if is_odd else None


def _check_guess(kind: Kind, scores: Sequence[float]) -> None:
    """Raise ValueError if even the best score is hardly one of the kind that it is taken for."""
    best = _odd_score(kind, scores)
    if best is None:
        return
    if kind == "loss":
        raise ValueError(
            f"validation scores of language models are taken for losses, and {best} would be one "
            "of a model that knows nothing; pass validation='accuracy' if they are accuracies in "
            "%, or validation='loss'"
        )
    raise ValueError(
        f"validation scores can't be told: the largest, {best}, is a low accuracy in % or an "
        "ordinary loss in nats; pass validation='accuracy' or validation='loss'"
    )


def _warn_of_odd(kind: Kind, scores: Sequence[float]) -> None:
    """Say how scores are read that could hardly be of the kind that the user named."""
    best = _odd_score(kind, scores)
    if best is None:
        return
    if kind == "loss":
        warn_once(
            "validation scores are read as losses in nats, as validation='loss' says, and the "
            f"least, {best:.4g}, would be one of a model that knows nothing; pass "
            "validation='accuracy' if they are accuracies in %",
            about=f"odd losses, {best}",
        )
    else:
        warn_once(
            "validation scores are read as accuracies in %, as validation='accuracy' says: the "
            f"largest, {best:.4g}, as {best:.4g} % right, and more is better; pass "
            "validation='loss' if they are losses in nats, of which less is better",
            about=f"odd accuracies, {best}",
        )


def _check_losses(scores: Sequence[float]) -> None:
    """Raise ValueError if one is below 0."""
    if any(score < -_ROUNDING for score in scores):
        raise ValueError(
            f"losses in nats are at least 0, got {min(scores)}; give the losses themselves, not "
            "what is the better the larger, or pass validation='accuracy' if they are accuracies"
        )


def _check_accuracies(scores: Sequence[float]) -> None:
    """Raise ValueError unless all are shares, or all in %."""
    if any(score < 0 or score > 100 for score in scores):
        raise ValueError(
            f"accuracies lie in [0, 1] or, in %, in [0, 100], got {max(scores, key=abs)}; pass "
            "validation='loss' if scores are losses in nats"
        )
    low = [score for score in scores if 0 < score <= 1]
    if low and max(scores) > 1:
        raise ValueError(
            f"accuracies must be all shares or all in %, got {low[0]} beside {max(scores)}; give "
            "shares, from 0 to 1"
        )
