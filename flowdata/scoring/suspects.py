"""Suspects: samples whose losses may depend on how many others share their pack.

The check before a run puts a few samples together. A model can be right for these and wrong for
more: experts overflow, or a batch is normalised. So some samples of the largest pack are checked
during the run; and a sample that a run found wrong is tried among all others of its pack before the
next one.
"""

from __future__ import annotations

import torch

from flowdata._common.unreadable import Unreadable
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.grouping import alone
from flowdata.scoring.job import FEW
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.truth import Truth
from flowdata.targets.target_losses import joined

_OF_LARGEST = 2  # samples of the largest pack that are checked, its last one among them


def in_largest_pack(plan: Plan) -> frozenset[int]:
    """Return the indices of a few samples of the pack that has most; none of a small data set.

    Of a small data set, of at most `FEW` samples, all were checked together.
    """
    if int(plan.sizes.sum()) <= FEW:
        return frozenset()
    pack = plan.pack(int(plan.sizes.argmax()))
    places = torch.linspace(0, len(pack) - 1, _OF_LARGEST + 1)[1:].long()
    return frozenset(pack[places].tolist())


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


def _disagreement_of(index: int, candidate: Candidate, truth: Truth, plan: Plan) -> str:
    job = truth.job
    indices = next(pack for pack in map(plan.pack, range(len(plan))) if index in pack)
    samples = [(each, job.dataset[each]) for each in indices.tolist()]
    readable = [pair for pair in samples if not isinstance(pair[1], Unreadable)]
    groups = candidate.grouping([sample for _, sample in readable])
    losses = joined([candidate.way(truth.model, job.collate(group)) for group in groups])
    row = [each for each, _ in readable].index(index)
    columns = {
        name: values[row : row + 1] for name, values in losses.columns(token_losses=False).items()
    }
    batch = job.collate([job.dataset[index]])
    return truth.difference(columns, truth.columns(batch), batch)
