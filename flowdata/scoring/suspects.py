"""Suspects: samples whose losses may depend on how many others share their pack.

The check before a run puts a few samples together. A model can be right for these and wrong for
more: experts overflow, or a batch is normalised. So some samples of the largest pack are checked
during the run; and a sample that a run found wrong is tried among all others of its pack before the
next one.

Samples of one shape are suspects as well where only these are collated together: the samples that
are checked before a run differ, so that each of them would be a batch of its own.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor

from flowdata._common.excerpts import first_line
from flowdata._common.unreadable import Unreadable
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.grouping import alike, alone
from flowdata.scoring.job import FEW, Job
from flowdata.scoring.kinds import LONGEST_CHECKED, longest_checked, tokens_of
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.truth import Truth
from flowdata.targets.target_losses import joined

_OF_LARGEST = 2  # samples of the largest pack that are checked, its last one among them
_MOST_READ = 64  # samples in which some of one shape are looked for


def in_largest_pack(plan: Plan, *, of_few: bool = False) -> frozenset[int]:
    """Return the indices of a few samples of the pack that has most, and of the largest long one.

    Args:
        plan: whose packs.
        of_few: of a small data set as well; else none, because all of its samples, which are at
            most `FEW`, were checked together.
    """
    largest = []
    if of_few or int(plan.sizes.sum()) > FEW:
        largest.append(int(plan.sizes.argmax()))
    if plan.options.max_tokens is not None:
        # Long samples are none of those that are checked before a run.
        sizes = plan.sizes * (plan.amounts > LONGEST_CHECKED * plan.sizes)
        largest += [int(sizes.argmax())] * bool((sizes > 1).any())
    return frozenset(index for number in largest for index in _some_of(plan.pack(number)))


def _some_of(pack: Tensor) -> list[int]:
    places = torch.linspace(0, len(pack) - 1, _OF_LARGEST + 1)[1:].long()
    some: list[int] = pack[places].tolist()
    return some


def disagreement_among_all(candidate: Candidate, truth: Truth, plan: Plan) -> str:
    """Return "" if a way gives each suspect its true loss in its pack, else what is wrong.

    Args:
        candidate: the way.
        truth: of single samples; its job names the suspects.
        plan: whose packs they are in.
    """
    if candidate.grouping is alone:
        return ""
    reasons = (_disagreement_of(index, candidate, truth, plan) for index in truth.job.suspects)
    return next(filter(None, reasons), "")


def disagreement_among_alike(candidate: Candidate, truth: Truth, plan: Plan) -> str:
    """Return "" if samples of one shape are right beside each other, else what is wrong.

    Of a small data set all that share a batch are looked at; of another one as many, in its largest
    packs.

    Args:
        candidate: the way; looked at where it collates samples of one shape together.
        truth: of single samples.
        plan: whose packs the samples share.
    """
    if candidate.grouping is not alike:
        return ""
    left, collate = FEW, truth.job.collate
    for group in _groups_of_one_shape(truth.job, plan):
        try:
            losses = candidate.way(truth.model, collate(group)).columns(token_losses=False)
        except Exception as error:  # whatever it is, samples alone do without
            return f"among samples of one shape, {first_line(error)}"
        for row, sample in enumerate(group[:left]):
            batch = collate([sample])
            columns = {name: values[row : row + 1] for name, values in losses.items()}
            if reason := truth.difference(columns, truth.columns(batch), batch):
                return f"among samples of one shape, {reason}"
        left -= len(group)
        if left <= 0:
            break
    return ""


def _groups_of_one_shape(job: Job, plan: Plan) -> Iterator[list[Any]]:
    """Samples of one shape that a run collates together, of the largest packs first."""
    read = 0
    for place in plan.sizes.argsort(descending=True, stable=True).tolist():
        if read >= _MOST_READ or int(plan.sizes[place]) < 2:
            return
        samples = [sample for _, sample in _readable(job, plan.pack(place))]
        read += len(samples)
        longest = longest_checked(job.loss)
        groups = (group for group in alike(samples) if len(group) > 1)
        yield from (group for group in groups if tokens_of(group[0]) <= longest)


def _readable(job: Job, indices: Tensor) -> list[tuple[int, Any]]:
    """The samples of a pack that can be read, with their indices."""
    samples = [(index, job.dataset[index]) for index in indices.tolist()]
    return [pair for pair in samples if not isinstance(pair[1], Unreadable)]


def _disagreement_of(index: int, candidate: Candidate, truth: Truth, plan: Plan) -> str:
    job = truth.job
    indices = next(pack for pack in map(plan.pack, range(len(plan))) if index in pack)
    readable = _readable(job, indices)
    groups = candidate.grouping([sample for _, sample in readable])
    try:
        losses = joined([candidate.way(truth.model, job.collate(group)) for group in groups])
    except Exception as error:  # whatever it is, samples alone do without
        return first_line(error)
    row = [each for each, _ in readable].index(index)
    columns = {
        name: values[row : row + 1] for name, values in losses.columns(token_losses=False).items()
    }
    batch = job.collate([job.dataset[index]])
    return truth.difference(columns, truth.columns(batch), batch)
