"""Candidates: the ways that a job could go, fastest first, and what each is called."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any

from torch import nn

from flowdata.models.as_loaded import putting_back
from flowdata.models.compiled import is_compiled
from flowdata.models.rope import longest_as_loaded
from flowdata.scoring.grouping import Grouping, alike, alone, together
from flowdata.scoring.job import Job
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packable import why_batch_not_packed, why_not_packed
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.ways import ways_of
from flowdata.scoring.plan.packs import Plan
from flowdata.targets.target_losses import TargetLosses, Way
from flowdata.targets.which_loss import LANGUAGE_LOSSES, OWN


@dataclass(frozen=True)
class Candidate:
    """One way to make losses, and which samples it is given together."""

    name: str
    way: Way
    grouping: Grouping = together


def candidates_of(
    job: Job, plan: Plan, model: nn.Module, batches: Sequence[Any], plain: Way
) -> list[Candidate]:
    """The ways that a job could go, fastest first, each sample alone last."""
    if job.loss == OWN:
        return [Candidate("the model's own loss, one sample at a time", plain, alone)]
    candidates: list[Candidate] = []
    name, whole = "", plain
    if isinstance(job.loss, str) and job.loss in LANGUAGE_LOSSES:
        ways = _language_ways(job, job.loss, plan, model, batches)
        candidates = [Candidate(*named) for named in ways]
        name, whole = ways[-1][0] + ", ", ways[-1][1]
    else:
        candidates.append(Candidate("", whole))
    candidates.append(Candidate(f"{name}samples of one length at a time", whole, alike))
    candidates.append(Candidate(f"{name}one sample at a time", plain, alone))
    put_back = putting_back(model)
    return [replace(each, way=_followed(each.way, put_back)) for each in candidates]


def _followed(way: Way, put_back: Callable[[], None]) -> Way:
    """A way, and after each call what puts the model back."""

    def followed(model: nn.Module, batch: Any) -> TargetLosses:
        try:
            return way(model, batch)
        finally:
            put_back()

    return followed


def _language_ways(
    job: Job, loss: str, plan: Plan, model: nn.Module, batches: Sequence[Any]
) -> list[tuple[str, Way]]:
    """The ways of language models, named, fastest first, full logits of a batch last."""
    prefix = job.prefix[: plan.options.prefix][: longest_as_loaded(model)]
    # Packs are cut by lengths without the prefix and the prompts that are run once. A pack that is
    # padded, or whose samples don't share them after all, is larger than planned, and is run in
    # slices. Without either no pack is larger than planned.
    is_shared = len(prefix) > 0 or plan.options.shared_prompts > 0
    max_tokens = plan.options.max_tokens if is_shared else None
    packings: list[tuple[str, Packing]] = []
    if not _why_padded(model, loss, batches):
        pack = partial(Packing, padded(loss, max_tokens), prefix, max_tokens, job.device)
        if plan.options.attention_by_products:
            packings.append(("samples packed, attention by products", pack(by_products=True)))
        packings.append(("samples packed", pack()))
    return ways_of(
        model,
        loss,
        packings=packings,
        max_tokens=max_tokens,
        columns=job.columns,
        compiled=is_compiled(model),
        device=job.device,
    )


def _why_padded(model: nn.Module, loss: str, batches: Sequence[Any]) -> str:
    """Why samples are not packed, "" if some are."""
    reasons = (
        [why_batch_not_packed(model, batch) for batch in batches] if loss == "causal_lm" else []
    )
    return why_not_packed(model, loss) or (reasons[0] if all(reasons) else "")


def describe(
    job: Job, plan: Plan, model: nn.Module, candidate: Candidate, batches: Sequence[Any]
) -> str:
    """A way in words: its name, how samples are laid out, and what it was checked on."""
    parts = [candidate.name] if candidate.name else []
    if isinstance(job.loss, str) and job.loss in LANGUAGE_LOSSES:
        parts += (
            ["layers compiled"] if is_compiled(model) and candidate.grouping is together else []
        )
        parts += _describe_samples(job, job.loss, plan, model, candidate, batches)
    return ", ".join(parts)


def _describe_samples(
    job: Job, loss: str, plan: Plan, model: nn.Module, candidate: Candidate, batches: Sequence[Any]
) -> list[str]:
    """How a language model's samples are laid out."""
    parts = []
    options = plan.options
    if candidate.grouping is not together:
        pass
    elif why_padded := _why_padded(model, loss, batches):
        parts.append(f"samples padded ({why_padded})")
    elif "packed" in candidate.name:
        if options.prefix:
            saved = options.prefix * (len(job.dataset) - 1)
            parts.append(f"a prefix of {options.prefix:,} tokens run once ({saved:,} tokens saved)")
        if options.shared_prompts:
            parts.append(f"shared prompts run once (about {options.shared_prompts:,} tokens saved)")
    if (longest := longest_as_loaded(model)) is not None:
        parts.append(
            f"samples of over {longest:,} tokens one at a time (their rotary frequencies depend "
            "on the length)"
        )
    return parts
