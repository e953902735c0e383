"""Choosing among fine-tuned models by what they learned and what they forgot, without old data.

What is learned is the validation score on the new task; what is forgotten is the drift. Both are
put into one unit, so that they can be added, at a rate of exchange that is the user's to set:

    losses       cost   = validation loss + exchange · KL          nats a target, both
    accuracies   cost   = −(accuracy + exchange · kept)            shares, both

On text that the frozen model wrote itself, its KL to the tuned model is the rise of the loss there:
with an exchange of 1 a nat lost on the old counts as much as a nat gained on the new. `Drift.kept`
says about what share of the old task's accuracy is left: with an exchange of 1 a point of accuracy
on the new task counts as much as a hundredth of the old accuracy.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from flowdata._common.notices import say_once
from flowdata._common.real_numbers import as_float, check_factor
from flowdata._common.resumable import check_natural
from flowdata.drift.drift import Drift, part_of_kept
from flowdata.drift.uncertainty import variance_of_difference
from flowdata.drift.validation import Kind, Validation, kind_and_unit
from flowdata.drift.which_head import check_same_head

Run = tuple[str, float, Drift]  # name, validation score, drift
_NEXT = 2  # runs that the best is compared with in words
_CERTAIN = 2.0  # standard errors from which on two runs can be told apart
_MOST_SAMPLES = 10_000_000  # of validation, that are named as what tells two runs apart


@dataclass(frozen=True)
class Candidate:
    """One run among those to choose from.

    Attributes:
        name: as the user named it.
        validation: as the user gave it: a loss in nats, or an accuracy.
        drift: as it was measured.
        cost: what the choice minimises, inf for a run that diverged.
        is_on_front: whether no other run is at least as good in both and better in one.
        is_tied: whether it is one of several that can't be told apart: the best and others.
        kind: what `validation` is: ``"loss"`` or ``"accuracy"``.
        reason: why it has its place: a sentence with the sums of the best and of the next ones, or
            with its own beside the best.
    """

    name: str
    validation: float
    drift: Drift
    cost: float
    is_on_front: bool
    is_tied: bool
    kind: Kind
    reason: str = ""


def choose(
    runs: Iterable[Run],
    *,
    validation: Validation = "auto",
    exchange: float = 1.0,
    validation_samples: int | None = None,
) -> str:
    """Return the name of the run that learned most for what it forgot.

    It says why, with the figures of the best and of the next ones (`Candidate.reason`), which are
    left out because they diverged, and what it took the scores for. It returns the best estimate
    also where other runs can't be told apart from it, and then says which of them drifted least,
    for those who can't afford to forget, and about how many validation samples would tell the two.

    Args:
        runs: (name, validation, drift) of each; see `rank`.
        validation: see `rank`.
        exchange: see `rank`.
        validation_samples: see `rank`.

    Raises:
        TypeError, ValueError: see `rank`.

    Example:
        >>> near = Drift(0.01, 0.01, 0.99, 0.98, samples=64, head="own", of="tokens")
        >>> far = Drift(0.90, 0.95, 0.70, 0.60, samples=64, head="own", of="tokens")
        >>> choose([("1e-5", 0.99, near), ("1e-3", 0.95, far)], validation="loss")
        '1e-5'
    """
    ranking, terms = _rank(runs, validation, exchange, validation_samples)
    if len(ranking) > 1:
        say_once(ranking[0].reason)
    out = [candidate.reason for candidate in ranking if math.isinf(candidate.cost)]
    if out:
        say_once(f"left out: {'; '.join(out)}")
    tied = [candidate for candidate in ranking if candidate.is_tied]
    if tied:
        say_once(_advice(tied, terms))
    return ranking[0].name


def rank(
    runs: Iterable[Run],
    *,
    validation: Validation = "auto",
    exchange: float = 1.0,
    validation_samples: int | None = None,
) -> list[Candidate]:
    """Return the runs as candidates, the best first.

    Args:
        runs: (name, validation, drift) of each, all drifts by one meter. Accuracies are shares or
            in %, those of all runs alike; a run whose score is no number has diverged and comes
            last.
        validation: whether scores are losses in nats, of which less is better, or accuracies;
            scores that could hardly be what it says are warned of. ``"auto"`` takes those of
            language models for losses and others for accuracies, says so, and refuses such scores.
        exchange: what the old counts beside the new; 0 chooses by validation alone. The best run
            has the least of validation loss + exchange · KL, in nats a target, or the most of
            accuracy + exchange · `Drift.kept`, both shares.
        validation_samples: how many samples an accuracy rests on, so that its own error counts
            when runs are told apart; None takes it as exact. It is refused for losses.

    Raises:
        TypeError: a run is no (name, number, Drift).
        ValueError: no runs, two of one name, drifts by several meters, or scores that can't be
            what `validation` says; `exchange` or `validation_samples` is too small, or the latter
            is given for losses.
    """
    return _rank(runs, validation, exchange, validation_samples)[0]


def _rank(
    runs: Iterable[Run], validation: Validation, exchange: float, validation_samples: int | None
) -> tuple[list[Candidate], _Terms]:
    """The candidates that `rank` returns, with what they were weighed in."""
    runs = [_checked(run) for run in runs]
    _check_runs(runs)
    exchange = check_factor("exchange", exchange)
    if validation_samples is not None:
        check_natural("validation_samples", validation_samples, least=1)
    scores = [score for _, score, _ in runs]
    kind, unit = kind_and_unit(validation, scores, is_of_language=runs[0][2].of == "tokens")
    if kind == "loss" and validation_samples is not None:
        raise ValueError(
            "validation_samples has no effect on losses: it says how certain an accuracy is; leave "
            "it out, or pass validation='accuracy' if the scores are accuracies"
        )
    if kind == "loss":  # accuracies go with the features' cosine
        check_same_head((name, drift) for name, _, drift in runs)
    terms = _Terms(kind, unit, exchange, validation_samples)
    points = [terms.point(run) for run in runs]
    ranking = sorted(zip(runs, points, strict=True), key=lambda pair: terms.cost(pair[1]))
    best, lowest = ranking[0][0], terms.cost(ranking[0][1])
    if math.isinf(lowest):
        raise ValueError("all runs diverged: none has a finite validation score and drift")
    is_near = [
        terms.cost(point) - lowest <= _CERTAIN * terms.error(run, best) for run, point in ranking
    ]
    candidates = [
        Candidate(
            *run,
            cost=terms.cost(point),
            is_on_front=_is_on_front(point, points),
            is_tied=is_near[place] and sum(is_near) > 1,
            kind=terms.kind,
            reason=terms.reason(place, [run for run, _ in ranking]),
        )
        for place, (run, point) in enumerate(ranking)
    ]
    return candidates, terms


def _advice(tied: Sequence[Candidate], terms: _Terms) -> str:
    """Which to take of several runs that can't be told apart, the best first."""
    best, least = tied[0], min(tied, key=lambda candidate: candidate.drift.kl)
    others = ", ".join(str(candidate.name) for candidate in tied[1:])
    found = f"{best.name} can't be told apart from {others}; of these {least.name} drifted least"
    if least is best:
        return f"{found}: take it, for it is the best estimate as well"
    samples = terms.samples_to_tell(
        *((each.name, each.validation, each.drift) for each in (best, least))
    )
    unit = 10 ** max(0, int(math.log10(samples)) - 1) if samples <= _MOST_SAMPLES else 0
    remedy = (
        f"about {math.ceil(samples / unit) * unit:,} validation samples would tell these two "
        "apart, if they differ by as much as here"
        if unit
        else "more validation samples or a larger probe may tell these two apart"
    )
    return (
        f"{found}: take it where you can't afford to forget, else {best.name}, the best estimate; "
        f"{remedy}"
    )


def _checked(run: Run) -> Run:
    """A run with its score as a float; raise TypeError for what is none."""
    if not isinstance(run, tuple | list) or len(run) != 3:
        raise TypeError(f"runs must be (name, validation, Drift) each, got {run!r}")
    name, score, drift = run
    if not isinstance(drift, Drift):
        raise TypeError(
            f"runs must be (name, validation, Drift), got {type(drift).__name__} for {name!r}; "
            "what Drift.to_dict() returned makes one again: Drift(**saved)"
        )
    if as_float(drift.kl) is None:
        raise TypeError(
            f"the drift of {name!r} must have a number as kl, got {drift.kl!r}; that of a model "
            "which gives no numbers, null on the command line, is float('inf')"
        )
    number = as_float(score)
    if number is None:
        raise TypeError(
            f"the validation score of {name!r} must be a number, got {score!r}; that of a run "
            "which diverged is float('nan')"
        )
    return name, number, drift


def _check_runs(runs: Sequence[Run]) -> None:
    if not runs:
        raise ValueError("runs is empty: there is nothing to choose from")
    names = [name for name, _, _ in runs]
    twice = next((name for name in names if names.count(name) > 1), None)
    if twice is not None:
        raise ValueError(f"two runs are named {twice!r}; give each a name of its own")
    if len({(drift.samples, drift.of) for _, _, drift in runs}) > 1:
        raise ValueError("the drifts of runs were measured on several probes; take one meter")


@dataclass(frozen=True)
class _Terms:
    """What runs are weighed in.

    Attributes:
        kind: of the validation scores.
        unit: a score of 1, in those that the user gave.
        exchange: see `rank`.
        validation_samples: see `rank`.
    """

    kind: Kind
    unit: float
    exchange: float
    validation_samples: int | None

    def point(self, run: Run) -> tuple[float, float]:
        """Return what a run lacks of the new and of the old, less for better; inf if it diverged.

        Both are in nats, or they are shares below 0.
        """
        _, score, drift = run
        if not (math.isfinite(score) and math.isfinite(drift.kl)):
            return math.inf, math.inf
        return (score, drift.kl) if self.kind == "loss" else (-score / self.unit, -drift.kept)

    def cost(self, point: tuple[float, float]) -> float:
        """Return what the choice minimises."""
        new, old = point
        return new + self.exchange * old if math.isfinite(new) else math.inf

    def reason(self, place: int, runs: Sequence[Run]) -> str:
        """Return the sentence on why a run has its place among those that are ordered by cost."""
        best, name = runs[0], runs[place][0]
        if math.isinf(self.cost(self.point(runs[place]))):
            return f"{name} diverged: {self._no_numbers(runs[place])}"
        if place:
            own, least = self._sums([runs[place], best])
            return f"{name} comes behind {best[0]}: {own} to {least}"
        most, nats = ("least", " nats a target") if self.kind == "loss" else ("most", "")
        new, old = ("validation loss", "KL") if self.kind == "loss" else ("accuracy", "kept")
        shown = [run for run in runs[: 1 + _NEXT] if math.isfinite(self.cost(self.point(run)))]
        least, *sums = self._sums(shown)
        reason = f"{name} has the {most} {new} + {self._factor}{old}: {least}{nats}"
        if not sums:
            return reason + "; all others diverged" * (len(runs) > 1)
        others = [f"{run[0]} with {of_run}" for run, of_run in zip(shown[1:], sums, strict=True)]
        return f"{reason}; next {'comes' if len(sums) == 1 else 'come'} {' and '.join(others)}"

    def _no_numbers(self, run: Run) -> str:
        """Which of a run's measures are no finite numbers."""
        _, score, drift = run
        values = {f"validation {self.kind}": score, "drift (kl)": drift.kl}
        return " and ".join(
            f"its {name} is {value}" for name, value in values.items() if not math.isfinite(value)
        )

    @property
    def _factor(self) -> str:
        return "" if self.exchange == 1 else f"{self.exchange:g} · "

    def _sums(self, runs: Sequence[Run]) -> list[str]:
        """What runs' costs are made of; of accuracies, which are costs below 0, their sum.

        They have as many digits as it takes to tell unlike costs apart.
        """
        points = [self.point(run) for run in runs]
        costs = {self.cost(point) for point in points}
        digits = next((d for d in (4, 6, 8) if len({f"{c:.{d}g}" for c in costs}) == len(costs)), 8)
        return [
            f"{abs(new):.{digits}g} + {self._factor}{abs(old):.{digits}g} = "
            f"{abs(self.cost((new, old))):.{digits}g}"
            for new, old in points
        ]

    def error(self, run: Run, other: Run) -> float:
        """Return the standard error of the difference of two runs' costs."""
        of_drift, of_a_sample = self._variances(run, other)
        samples = self.validation_samples or math.inf
        return math.sqrt(of_drift + of_a_sample / samples)

    def samples_to_tell(self, run: Run, other: Run) -> float:
        """Return how many validation samples tell two runs apart whose costs differ as they do.

        inf where no number does, or none is known, as of losses.
        """
        if self.validation_samples is None:
            return math.inf
        of_drift, of_a_sample = self._variances(run, other)
        difference = self.cost(self.point(run)) - self.cost(self.point(other))
        rest = (difference / _CERTAIN) ** 2 - of_drift
        return of_a_sample / rest if rest > 0 else math.inf

    def _variances(self, run: Run, other: Run) -> tuple[float, float]:
        """Of the difference of two runs' costs: by their drift, and by one validation sample."""
        (_, score, drift), (_, other_score, other_drift) = run, other
        name, factor = ("kl", 1.0) if self.kind == "loss" else part_of_kept(drift)
        of_drift = (self.exchange * factor) ** 2 * variance_of_difference(drift, other_drift, name)
        of_a_sample = 0.0
        if self.validation_samples:
            scores = filter(math.isfinite, (score, other_score))
            shares = [min(each / self.unit, 1.0) for each in scores]
            of_a_sample = sum(share * (1 - share) for share in shares)
        return of_drift, of_a_sample


def _is_on_front(point: tuple[float, float], points: Sequence[tuple[float, float]]) -> bool:
    """Whether no other run has learned and kept at least as much, and more of one."""
    return math.isfinite(point[0]) and not any(
        other[0] <= point[0] and other[1] <= point[1] and other != point for other in points
    )
