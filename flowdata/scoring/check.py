"""The check: which way to the losses is right for a model and its data.

    samples that differ ──┬─ each alone, in float32 and in the run's dtype → truth.py
                          └─ together, by the fastest way that is left     → the same? taken
                                                                             else the next way
    during the run        a few in a thousand and each new kind, alone      → not the same? stop

Whatever a model does that a fast way doesn't know of (a scaled head, an attention of its own,
padding that leaks) shows in the comparison. The last way is every sample alone: the truth itself.
Where the model makes a loss of its own, the loss by name has to be that one.
"""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import dataclass
from itertools import chain, zip_longest
from typing import Any, NoReturn

import torch
from torch import nn

from flowdata._common.notices import logger
from flowdata._common.unreadable import Unreadable
from flowdata.errors import SampleError
from flowdata.models.compiled import as_written
from flowdata.models.failing import order_explained
from flowdata.models.placement import reshard
from flowdata.models.precision import dtype_of
from flowdata.models.tensors import cloned, to_device
from flowdata.scoring.candidates import candidates_of, describe
from flowdata.scoring.evidence import (
    Evidence,
    collate_groups,
    disagreement,
    gather_evidence,
)
from flowdata.scoring.grouping import Grouping, together
from flowdata.scoring.job import FEW, Job
from flowdata.scoring.kinds import differing, is_short, kind_of, longest_checked, tokens_of
from flowdata.scoring.language.ways import plain_way
from flowdata.scoring.meaning import (
    further_to_ask,
    loss_with_labels,
    losses_with_labels,
    output_with_labels,
    part_to_compare,
)
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.ranks import Ranks
from flowdata.scoring.truth import Truth
from flowdata.store.packs import Columns
from flowdata.targets.own_loss import agrees, least_difference
from flowdata.targets.predictions import (
    callable_way,
    classes_come_last,
    own_way,
    prediction_way,
)
from flowdata.targets.target_losses import Way, joined
from flowdata.targets.which_loss import LANGUAGE_LOSSES, OWN, has_known_loss

_MOST_SOUGHT = 1000  # samples that are looked through for one whose shape tells the axis of classes
# Samples before a run. Of a data set as small as `FEW` all are: a single wrong one would be a large
# share of its figures, and too few are looked at during the run to meet it there.
_MOST_CHECKED = 8
_MOST_ASKED = 3  # samples whose loss is compared with the model's own


@dataclass(frozen=True)
class AgreedWay:
    """The way that is right for a job, and the truth that it is judged by.

    Attributes:
        way: of a pack: a list of batches, as `grouping` cuts it.
        description: of the way, for people.
        grouping: which samples of a pack are collated together.
        truth: of single samples.
        kinds: of the samples that were checked.
    """

    way: Way
    description: str
    grouping: Grouping
    truth: Truth
    kinds: list[Hashable]


def agreed_way(job: Job, plan: Plan, model: nn.Module, ranks: Ranks) -> AgreedWay:
    """Return the way that all ranks choose.

    Raises:
        ValueError: another rank chose another way, so that losses would depend on who makes them;
            or the loss by name is not the model's own.
    """
    agreed = choose_way(job, plan, model)
    if len(set(ranks.gather("way", agreed.description))) > 1:
        raise ValueError(
            f"rank {ranks.rank} can score by {agreed.description!r}, another rank can't: losses "
            "would depend on who makes them; run on machines of one kind"
        )
    return agreed


def choose_way(job: Job, plan: Plan, model: nn.Module) -> AgreedWay:
    """Return the fastest way to the losses that is right for samples that differ.

    Args:
        job: the job.
        plan: whose packs the way is for.
        model: the job's model as it is run.
    """
    samples = samples_to_check(job, plan)
    batches = [job.collate([sample]) for sample in samples]
    with order_explained(batches[0] if isinstance(job.loss, str) else None):
        plain_of = _plain_way(job, batches)
        in_nats = not (callable(job.loss) or job.loss in ("mse", OWN))
        truth = Truth(job, plan.options, model, plain_of, in_nats, batches)
        evidence = gather_evidence(truth, samples, batches)
    _check_loss(truth, evidence)
    if job.loss == OWN and _are_all_zero(evidence) and (reason := _loss_of_two(truth, evidence)):
        _refuse_comparing(job, reason)
    reshard(model)  # else a sharded head would look like a whole one
    whole, _ = collate_groups(truth, samples, together)
    for place, candidate in enumerate(candidates_of(job, plan, model, whole, plain_of(model))):
        reason = disagreement(candidate, truth, evidence, plan)
        if reason and callable(job.loss) and _are_all_zero(evidence):
            _refuse_comparing(job, reason)
        if not reason:
            return AgreedWay(
                _of_batches(candidate.way),
                describe(job, plan, model, candidate, whole),
                candidate.grouping,
                truth,
                list(map(kind_of, samples)),
            )
        way = candidate.name or "whole batches"
        tell = logger.debug if place else logger.warning  # the ways after the first are details
        tell("not by %s: %s; a slower, exact way is tried", way, reason)
    raise ValueError(
        f"the model gives a sample another loss each time it is run alone ({reason}); it has to be "
        "deterministic in eval mode"
    )


def samples_to_check(job: Job, plan: Plan) -> list[Any]:
    """Return readable samples that differ; of a small data set all of them."""
    longest = longest_checked(job.loss)
    ends = plan.order[[0, len(plan.order) // 2, -1]].tolist()  # plans begin with the longest
    samples = list(job.few_samples)
    for index in ends:
        with contextlib.suppress(SampleError):  # the run will meet it and say so
            samples.append(job.dataset[index])
    samples = [sample for sample in samples if not isinstance(sample, Unreadable)]
    if len(job.dataset) <= FEW:
        short = [sample for sample in job.few_samples if tokens_of(sample) <= longest]
        short = short or job.few_samples[:1]
        # Shortest and longest by turns, so that those that share a batch differ.
        halves = short[: (len(short) + 1) // 2], short[::-1][: len(short) // 2]
        return [each for pair in zip_longest(*halves) for each in pair if each is not None]
    suspects = [job.dataset[index] for index in job.suspects]
    places = differing(samples, _MOST_CHECKED, longest)
    return [*suspects, *(samples[place] for place in places)]


def _plain_way(job: Job, batches: Sequence[Any]) -> Callable[[nn.Module], Way]:
    """What makes the way of one sample alone, by the model's own forward, for a model."""
    loss, columns, device = job.loss, job.columns, job.device
    if not isinstance(loss, str):
        return lambda _: callable_way(loss, output_with_labels, device)
    if loss == OWN:
        return lambda _: own_way(loss_with_labels, device)
    if loss in LANGUAGE_LOSSES:
        return lambda model: plain_way(model, loss, columns, device)
    last = [] if loss == "cross_entropy" else [False]

    def way_of(model: nn.Module) -> Way:
        if not last:  # not before: where a model fails on a sample, the evidence says why
            last.append(classes_come_last(model, chain(batches, _further_batches(job)), device))
        return prediction_way(loss, columns, device, classes_last=last[0])

    return way_of


def _are_all_zero(evidence: Evidence) -> bool:
    """Whether each sample has a loss of 0 when it is alone."""
    return not any(float(each["loss"]) for each in evidence.plain)


def _loss_of_two(truth: Truth, evidence: Evidence) -> str:
    """The model's own loss of two samples in a batch, in words; "" where it is 0."""
    words = ""
    # A trained model tells two samples apart, so that the loss of both can be next to 0; one from
    # itself it can't.
    for pair in (evidence.samples[:1] * 2, evidence.samples[:2]):
        with contextlib.suppress(Exception):  # samples that can't share a batch aren't compared
            batch = to_device(truth.job.collate(pair), truth.job.device)
            loss = loss_with_labels(truth.model, batch) or 0.0
            if not agrees(loss, 0.0, torch.float32):
                words = f"{loss:.4g} for two of them"
    return words


def _refuse_comparing(job: Job, reason: str) -> NoReturn:
    """Raise ValueError for a loss that compares the samples of a batch, and is 0 of each alone."""
    name = "callable" if callable(job.loss) else repr(job.loss)
    raise ValueError(
        f"loss={name} gives each sample a loss of 0 when it is alone, and another one beside "
        f"others ({reason}): it compares the samples of a batch, as contrastive losses do, so that "
        "no sample has a loss of its own; pass loss=callable(model, batch) -> (B,) losses that "
        "scores each sample by itself, against fixed candidates"
    )


def _further_batches(job: Job) -> Iterator[Any]:
    """Short samples from all over the data set, each collated alone."""
    size = len(job.dataset)
    for index in range(0, size, -(-size // _MOST_SOUGHT)):
        with contextlib.suppress(SampleError):  # the run will meet it and say so
            sample = job.dataset[index]
            if not isinstance(sample, Unreadable) and is_short(sample):
                yield job.collate([sample])


def _check_loss(truth: Truth, evidence: Evidence) -> None:
    """Raise ValueError where the loss by name is not the model's own.

    They are compared on whole samples but for some long texts, see `part_to_compare`.
    """
    if not isinstance(truth.job.loss, str) or truth.job.loss == OWN:
        return
    batches, plain = [], []
    for place in _asked(truth, evidence):
        whole = evidence.batches[place]
        batch = part_to_compare(truth.job.model, whole)  # a copy has hooks
        batches.append(batch)
        plain.append(evidence.plain[place] if batch is whole else truth.columns(batch))
    if not has_known_loss(truth.job.model) and _makes_loss(truth, batches[:1], plain[:1]):
        for batch in further_to_ask(truth.job.dataset, truth.job.collate):
            with contextlib.suppress(RuntimeError):  # the run will meet it and say so
                plain.append(truth.columns(batch))
                batches.append(batch)
    if not _has_own_loss(truth, truth.model, batches, plain):
        with truth.exact_model() as model:  # it may have been rounding
            exact = [] if model is None else [truth.columns(batch, model) for batch in batches]
            if model is None or not _has_own_loss(truth, model, batches, exact):
                _refuse_loss(truth, model or truth.model, batches, exact or plain)


def _asked(truth: Truth, evidence: Evidence) -> list[int]:
    """The places of samples whose loss is compared with the model's own.

    Of tokens each sample has many targets, so that one of each kind will do.
    """
    places = [place for place, columns in enumerate(evidence.plain) if int(columns["count"])]
    if truth.job.loss not in LANGUAGE_LOSSES:
        return places[:_MOST_ASKED]
    firsts: dict[Hashable, int] = {}
    for place in places:
        firsts.setdefault(kind_of(evidence.samples[place]), place)
    return list(firsts.values())


def _makes_loss(truth: Truth, batches: Sequence[Any], columns: Sequence[Columns]) -> bool:
    """Whether the model makes a loss itself."""
    return any(values for values, _ in _own_and_named(truth, truth.model, batches, columns))


def _has_own_loss(
    truth: Truth, model: nn.Module, batches: Sequence[Any], columns: Sequence[Columns]
) -> bool:
    """Whether the loss by name is that which the model makes itself, if it makes one."""
    least = least_difference(str(truth.job.loss), [float(each["loss"]) for each in columns])
    return all(
        not values or any(agrees(value, true, torch.float32, least) for value in values)
        for values, true in _own_and_named(truth, model, batches, columns)
    )


def _own_and_named(
    truth: Truth, model: nn.Module, batches: Sequence[Any], columns: Sequence[Columns]
) -> Iterator[tuple[list[float], float]]:
    """A few samples' own losses, as they can be meant, and those by the loss's name."""
    for batch, true in zip(batches, columns, strict=True):
        try:
            with as_written(model):
                own = cloned(batch)  # a forward may change its inputs
                values = losses_with_labels(model, to_device(own, truth.job.device))
        except Exception:  # a model that can't take its labels along makes no loss
            return
        yield values, float(true["loss"])


def _refuse_loss(
    truth: Truth, model: nn.Module, batches: Sequence[Any], columns: Sequence[Columns]
) -> None:
    """Raise ValueError, with both numbers, where the difference is no rounding of the model's."""
    dtype = dtype_of(model)
    least = least_difference(str(truth.job.loss), [float(each["loss"]) for each in columns])
    for values, named in _own_and_named(truth, model, batches, columns):
        if values and not any(agrees(value, named, dtype, least) for value in values):
            own = " or ".join(f"{value:.6g}" for value in values)
            raise ValueError(
                f"loss={truth.job.loss!r} gives a sample {named:.6g}, and the model's own loss is "
                f"{own}: its labels mean something else (a shift, class weights, "
                "smoothing, …). Pass loss='own', which takes the model's own, one sample at a "
                "time, another name, or a callable (model, batch) -> (B,) losses"
            )


def _of_batches(way: Way) -> Way:
    """Return the way of a list of batches."""

    def all_batches(model: nn.Module, batches: Sequence[Any]) -> Any:
        return joined([way(model, batch) for batch in batches])

    return all_batches
