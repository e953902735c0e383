"""The check: which way to rows gives a sample the predictions that the model itself makes of it.

It is the check of scores (flowdata/scoring/evidence.py), on two numbers of each prediction that
need no label: how surprising its likeliest class is, in nats, and a mean that tells classes apart.

    each sample alone, the model's own logits ──────────────┐
    rows, by a way, of samples together ── output layer ────┴→ the same two numbers, or another way
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata._common.offsets import offsets_of
from flowdata.drift.ways import output_layer, way_to_logits, ways_to_rows
from flowdata.head.kl import Predictions, count_classes, logits_of
from flowdata.models.placement import reshard
from flowdata.scoring.batches import is_drawn
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.check import samples_to_check
from flowdata.scoring.evidence import disagreement, gather_evidence
from flowdata.scoring.job import Job
from flowdata.scoring.kinds import longest_checked, tokens_of
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.suspects import in_largest_pack
from flowdata.scoring.truth import Truth, difference
from flowdata.targets.target_losses import TargetLosses, Way

_LOGITS = 1 << 22  # of the rows whose signs are taken at once
_GOLDEN = 0.6180339887498949  # multiples of it, less whole numbers, lie evenly in [0, 1)


def right_way(job: Job, plan: Plan, model: nn.Module, head: str | None) -> Candidate:
    """Return the fastest way to rows from which the predictions of samples alone are made.

    Args:
        job: whose samples; it may name suspects.
        plan: whose packs the way is for.
        model: the job's model as it is run.
        head: the name of the layer that makes the logits, None where there is none.

    Raises:
        ValueError: there is none.
    """
    samples, batches = samples_to_check(job, plan), _batches_to_check(job, plan)
    truth = _truth(job, plan, model, head, batches)
    evidence = gather_evidence(truth, samples, batches)
    reshard(model)  # else a sharded head would look like a whole one
    reasons: list[tuple[str, str]] = []
    candidates = ways_to_rows(job, plan, model, head)
    for candidate in candidates:
        to_signs = replace(candidate, way=_way_to_signs(job, candidate.way, head))
        reason = disagreement(to_signs, truth, evidence, plan)
        if not reason:
            break
        reasons.append((candidate.name, reason))
    else:
        if any(truth.difference(truth.columns(b), truth.columns(b), b) for b in batches):
            raise ValueError(
                "the model makes other predictions of a sample each time it is run alone "
                f"({reason}); it has to be deterministic in eval mode"
            )
        if not _is_rounding(truth, plan, head):
            raise ValueError(
                f"the model's logits are not what its output layer makes of a row ({reason}): it "
                "changes them in a way that its configuration does not tell, or other rows play a "
                "part, as under dynamic quantisation; so its drift can't be measured from what the "
                "layer is given"
            )
    for name, why in reasons[: candidates.index(candidate)]:
        logger.warning("not reading %s: %s; a slower way is right", name, why)
    return candidate


def _is_rounding(truth: Truth, plan: Plan, head: str | None) -> bool:
    """Whether samples alone are off by what their dtype may round away, and by nothing in float32.

    By chance a sample of few targets is off by more than the samples that rounding is known from.
    """
    if truth.is_exact:
        return False
    exact_job = replace(truth.job, dtype=torch.float32)
    usual = replace(truth, errors={}, is_last_look=True)  # allows what is usual in the dtype
    with truth.exact_model() as model:
        if model is None:
            return False
        exact = replace(truth, job=exact_job, model=model)
        ways = [(_signs_alone(each, plan, head), each) for each in (exact, usual)]
        return not any(
            difference(each, way(each.model, batch).columns(token_losses=False), true)
            for batch in truth.batches
            for true in [exact.columns(batch)]
            for way, each in ways
        )


def find_suspect(
    job: Job, plan: Plan, model: nn.Module, head: str | None, way: Candidate, rows: TargetLosses
) -> int | None:
    """Return a sample that has other predictions alone than those of its rows, or None.

    Looked at are a few samples of the largest pack, and a random few in a thousand: a model can be
    right for those that were checked beside each other and wrong for more.

    Args:
        job: see `right_way`.
        plan: see `right_way`.
        model: see `right_way`.
        head: see `right_way`.
        way: by which the rows were read.
        rows: of all samples, in the order of the data set.
    """
    indices = in_largest_pack(plan, of_few=True) | set(filter(is_drawn, range(len(job.dataset))))
    # By luck one sample's rounding can be tiny, so it is learned from those of the check as well.
    truth = _truth(job, plan, model, head, _batches_to_check(job, plan))
    offsets = offsets_of(rows.counts).tolist()
    for index in sorted(indices):
        sample = job.dataset[index]
        if tokens_of(sample) > longest_checked(job.loss):
            continue
        part = rows.values[offsets[index] : offsets[index + 1]]
        layer = output_layer(model, job.loss, head)
        signs = _signs(Predictions(part, layer), rows.counts[index : index + 1])
        batch = job.collate([sample])
        reason = truth.difference(signs.columns(token_losses=False), truth.columns(batch), batch)
        if reason:
            logger.warning("sample %d, looked at again alone: %s", index, reason)
            return index
    return None


def _batches_to_check(job: Job, plan: Plan) -> list[Any]:
    return [job.collate([sample]) for sample in samples_to_check(job, plan)]


def _truth(job: Job, plan: Plan, model: nn.Module, head: str | None, batches: list[Any]) -> Truth:
    """The truth about samples: signs of the logits that a model itself makes of each alone."""

    def plain_of(model: nn.Module) -> Way:
        way = way_to_logits(job, model, head)

        def signs(model: nn.Module, batch: Any) -> TargetLosses:
            logits = way(model, batch)
            return _signs(Predictions(logits.values, nn.Identity()), logits.counts)

        return signs

    noun = "prediction"  # of which the signs, and no losses, are compared
    return Truth(job, plan.options, model, plain_of, in_nats=True, batches=batches, noun=noun)


def _signs_alone(truth: Truth, plan: Plan, head: str | None) -> Way:
    """The way of a sample alone to its rows and on to signs."""
    way = ways_to_rows(truth.job, plan, truth.model, head)[-1].way
    return _way_to_signs(truth.job, way, head)


def _way_to_signs(job: Job, way: Way, head: str | None) -> Way:
    """The way to signs of the predictions that an output layer makes of a way's rows."""

    def signs(model: nn.Module, batch: Any) -> TargetLosses:
        rows = way(model, batch)
        return _signs(Predictions(rows.values, output_layer(model, job.loss, head)), rows.counts)

    return signs


def _signs(predictions: Predictions, counts: Tensor) -> TargetLosses:
    """Two numbers of each prediction, which differ where predictions do."""
    if not len(predictions.rows):
        empty = torch.empty(0, dtype=torch.float32)
        return TargetLosses(empty, counts, {"class": empty})
    classes = count_classes(predictions)
    places = torch.arange(classes, device=predictions.rows.device, dtype=torch.float64)
    places = (places * _GOLDEN).frac().float()
    parts = []
    for rows in predictions.rows.split(max(1, _LOGITS // classes)):
        logs = logits_of(Predictions(rows, predictions.layer)).log_softmax(1)
        parts.append(torch.stack([-logs.max(1).values, logs.exp() @ places]))
    surprises, means = torch.cat(parts, 1)
    return TargetLosses(surprises, counts, {"class": means})
