"""Evidence: samples that ways are judged by, and what is wrong with a way.

    samples ──┬─ each alone, in the run's dtype, and in float32 where it matters → truth.py
              └─ together, as a way's grouping says                            → the same?

What is judged need not be losses: any column of numbers that a way makes of samples will do.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from torch import nn

from flowdata._common.excerpts import first_line
from flowdata._common.progress import progress_bar
from flowdata.models.compiled import give_up, is_compiled
from flowdata.models.failing import explain_failure
from flowdata.models.layout import is_channels_last, let_channels_last
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.grouping import Grouping, together
from flowdata.scoring.job import FEW
from flowdata.scoring.kinds import is_short, kind_of, tokens_of
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.suspects import disagreement_among_alike, disagreement_among_all
from flowdata.scoring.truth import Truth, check_size, difference
from flowdata.store.packs import Columns
from flowdata.targets.labels import split_unread
from flowdata.targets.target_losses import joined


@dataclass
class Evidence:
    """Samples to judge ways by.

    Attributes:
        samples: the samples.
        batches: each collated alone.
        plain: their columns, each alone in the run's dtype.
        exact: the same in float32, as far as they are known, of the first samples.
        is_whole: whether all that can be learned in float32 was.
    """

    samples: list[Any]
    batches: list[Any]
    plain: list[Columns]
    exact: list[Columns]
    is_whole: bool = False

    def true(self, place: int) -> Columns:
        """Return the best known columns of a sample."""
        return self.exact[place] if place < len(self.exact) else self.plain[place]


def gather_evidence(truth: Truth, samples: list[Any], batches: list[Any]) -> Evidence:
    """Return the truth of samples.

    Args:
        truth: makes it.
        samples: as `samples_to_check` returns them.
        batches: each collated alone.

    Raises:
        ValueError: the model does not run in the run's dtype, which is lower than its own, or loses
            more than rounding there; or it fails on a sample.
    """
    try:
        plain = _columns_of_each(truth, batches)
    except RuntimeError as error:
        truth.check_dtype(batches[0], error)
        if isinstance(truth.job.loss, str):  # else it may be the user's function that fails
            explain_failure(error, split_unread(batches[0])[0], "a sample of the data set")
        raise
    evidence = Evidence(samples, batches, plain, list(plain) if truth.is_exact else [])
    if not truth.is_exact and len(truth.job.dataset) <= FEW:
        _look_again(truth, evidence)
    elif truth.is_lowered:
        _look_in_float32(truth, evidence)
    if truth.is_lowered and evidence.exact:
        truth.check_rounding(plain, evidence.exact)
    return evidence


def _columns_of_each(
    truth: Truth, batches: list[Any], model: nn.Module | None = None
) -> list[Columns]:
    """Each batch's columns, under a progress bar: a large model takes a while."""
    columns, shown, size = [], truth.job.progress, len(batches)
    name = f"checking each sample's {truth.noun} alone" + ", in float32" * (model is not None)
    with progress_bar(size, name, "samples", shown=shown, patient=True) as advance:
        for batch in batches:
            columns.append(truth.columns(batch, model))
            advance(1)
    return columns


def disagreement(candidate: Candidate, truth: Truth, evidence: Evidence, plan: Plan) -> str:
    """Return "" if a way gives samples their true columns, else what is wrong.

    Args:
        candidate: the way.
        truth: of single samples; its job names suspects.
        evidence: samples that differ, which the way is given beside each other.
        plan: in whose packs the way is given suspects, and samples of one shape.
    """
    is_compiled_way = is_compiled(truth.model) and candidate.grouping is together
    reason = _disagreement(candidate, truth, evidence)
    if reason and is_compiled_way:
        give_up(truth.model, reason)  # it may fail on account of the compiled layers
        reason = _disagreement(candidate, truth, evidence)
    reason = reason or _disagreement_in_packs(candidate, truth, plan)
    if reason and is_channels_last(truth.model):
        let_channels_last(truth.model, False)
        reason = disagreement(candidate, truth, evidence, plan)
        let_channels_last(truth.model, bool(reason))  # it was not the layout
    return reason


def _disagreement_in_packs(candidate: Candidate, truth: Truth, plan: Plan) -> str:
    """The same of suspects among all samples of their pack, and of samples of one shape."""
    reason = disagreement_among_all(candidate, truth, plan)
    return reason or disagreement_among_alike(candidate, truth, plan)


def _disagreement(candidate: Candidate, truth: Truth, evidence: Evidence) -> str:
    """The same of samples that differ.

    A float32 copy of the model costs memory and time, so it is made only where a difference is
    larger than rounding makes anyway; then all samples are looked at in float32.
    """
    try:
        columns = _columns_of(candidate, truth, evidence)
    except Exception as error:  # whatever it is, another way may do without
        return first_line(error)
    reason = _first_difference(truth, columns, evidence)
    if reason and not truth.is_exact and not evidence.is_whole:
        _look_again(truth, evidence)
        reason = _first_difference(truth, columns, evidence)
    if not reason:
        truth.samples = len(columns)
        truth.largest = max(
            float((each["loss"] - evidence.true(place)["loss"]).abs().nan_to_num())
            for place, each in enumerate(columns)
        )
    return reason


def _look_in_float32(truth: Truth, evidence: Evidence) -> None:
    """Learn the truth of the samples in float32."""
    with truth.exact_model() as model:
        if model is not None:
            evidence.exact.extend(_columns_of_each(truth, evidence.batches, model))
            truth.learn_errors(evidence.plain, evidence.exact)


def _look_again(truth: Truth, evidence: Evidence) -> None:
    """Learn the truth of all samples in float32, and what rounding costs on further ones."""
    evidence.is_whole = True
    known = set(map(id, evidence.samples))  # of a small data set all
    others = [each for each in truth.job.few_samples if is_short(each) and id(each) not in known]
    further = list(map(truth.job.collate, ([each] for each in others)))
    with truth.exact_model() as model:
        if model is None:
            truth.is_last_look = True
            return
        rest = evidence.batches[len(evidence.exact) :]
        exact = _columns_of_each(truth, [*rest, *further], model)
    evidence.exact.extend(exact[: len(rest)])
    truth.learn_errors(evidence.plain, evidence.exact)
    truth.learn_errors([truth.columns(batch) for batch in further], exact[len(rest) :])


def _columns_of(candidate: Candidate, truth: Truth, evidence: Evidence) -> list[Columns]:
    """What a way makes of the samples, together where they can be collated together."""
    batches, places = collate_groups(truth, evidence.samples, candidate.grouping)
    losses = joined([candidate.way(truth.model, batch) for batch in batches])
    columns = losses.columns(token_losses=False)
    check_size(columns, len(places))
    rows = sorted(range(len(places)), key=places.__getitem__)
    return [{name: values[row : row + 1] for name, values in columns.items()} for row in rows]


def collate_groups(
    truth: Truth, samples: Sequence[Any], grouping: Grouping
) -> tuple[list[Any], list[int]]:
    """Return samples collated as a grouping says, and their places in the batches' order.

    Args:
        truth: whose job collates, and whose options say how large a batch may be.
        samples: to collate.
        grouping: which of them share a batch.
    """
    collate, most = truth.job.collate, truth.options.max_tokens

    def batches_of(group: Sequence[Any]) -> list[Any]:
        return [collate(part) for each in grouping(group) for part in _cut(each, most)]

    try:
        return batches_of(samples), list(range(len(samples)))
    except Exception:  # kinds that can't be collated together never share a pack
        by_kind: dict[Any, list[int]] = {}
        for place, sample in enumerate(samples):
            by_kind.setdefault(kind_of(sample), []).append(place)
        if len(by_kind) == 1:
            raise
    groups = [[samples[place] for place in places] for places in by_kind.values()]
    batches = [batch for group in groups for batch in batches_of(group)]
    return batches, [place for places in by_kind.values() for place in places]


def _cut(group: list[Any], most: int | None) -> list[list[Any]]:
    """A group in parts that are no larger than a pack: larger ones would be run in another way."""
    parts: list[list[Any]] = []
    for sample in group:
        longest = max(map(tokens_of, [sample, *parts[-1]])) if parts else 0
        if parts and (most is None or longest * (len(parts[-1]) + 1) <= most):
            parts[-1].append(sample)
        else:
            parts.append([sample])
    return parts


def _first_difference(truth: Truth, columns: Sequence[Columns], evidence: Evidence) -> str:
    reasons = (difference(truth, each, evidence.true(place)) for place, each in enumerate(columns))
    return next(filter(None, reasons), "")
