"""Planning: the options by which a job's data set is cut into packs, and agreement on the plan."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from flowdata.errors import ScoreMismatchError
from flowdata.models.compiled import gains, pays
from flowdata.scoring.job import Job
from flowdata.scoring.language.packable import has_plain_attention, why_not_packed
from flowdata.scoring.language.products import products_gain
from flowdata.scoring.plan.lengths import sample_lengths
from flowdata.scoring.plan.packs import Plan, PlanOptions, plan_fixed, plan_padded
from flowdata.scoring.plan.prompts import shared_prompts
from flowdata.scoring.ranks import SAME_CALL, Ranks
from flowdata.scoring.threads import choose_threads
from flowdata.store.format import Manifest
from flowdata.store.identity import check_identity

# Tokens, or samples, in one pack where the user names no number: enough to keep matrix products
# at their full rate on the CPUs measured, and 16 layers of 2,048 on an H200; the number of samples
# on a GPU is a guess.
_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}


def shared_plan(
    job: Job, draft: Manifest, begun: Manifest | None, ranks: Ranks
) -> tuple[Plan, Manifest]:
    """Return rank 0's plan, which every rank makes for itself, and the manifest with it.

    A plan can be large and is quickly made, so ranks compare its digest rather than send it.

    Args:
        job: the job.
        draft: the manifest of this call, with an empty plan.
        begun: on rank 0, the manifest of a store that goes on; None for a new one.
        ranks: the ranks that share the call.

    Raises:
        ScoreMismatchError: the store was begun with another plan, or rank 0 makes another.
    """
    begun = ranks.from_first("begun", begun)
    # Rank 0 speaks for all machines here: ranks that choose for themselves could differ.
    is_planned = begun is not None and bool(begun["plan"])
    is_chosen_here = ranks.is_first and not is_planned
    own = choose_threads(job.dtype, job.device) if is_chosen_here else torch.get_num_threads()
    machine = [own, gains(job.dtype, job.device), products_gain(job.dtype, job.device)]
    threads, compiling, by_products = ranks.from_first("machine", machine)
    kept = begun["plan"] if begun is not None else {}
    plan = make_plan(job, threads, kept, compiling_gains=compiling, by_products=by_products)
    if kept:
        check_identity(kept, plan.to_manifest(), "the store")
    manifest: Manifest = {**(begun or draft), "plan": plan.to_manifest()}
    manifest = ranks.from_first("manifest", manifest)
    check_identity(manifest["plan"], plan.to_manifest(), "rank 0's plan", SAME_CALL)
    return plan, manifest


def make_plan(
    job: Job,
    threads: int,
    kept: Mapping[str, Any],
    *,
    compiling_gains: bool = False,
    by_products: bool = False,
) -> Plan:
    """Return how the job's data set is cut into packs.

    Args:
        job: the job.
        threads: with which PyTorch computes.
        kept: the plan's field in the manifest of a store that goes on; empty for a new one. Its
            options go before `threads` and what the job leaves open, since losses of one store
            have to be made in one way.
        compiling_gains: whether compiled layers are faster on the machine that scores.
        by_products: whether attention by products is.

    Raises:
        ScoreMismatchError: the job asks for other options than the store was begun with.
        ValueError: it asks for an option that has no effect.
    """
    _check_options(job, kept)
    lengths = sample_lengths(job.dataset, job.lengths)
    options = PlanOptions(
        max_tokens=job.max_tokens,
        batch_size=job.batch_size,
        prefix=len(job.prefix),
        compile=_compiles(job, lengths, compiling_gains),
        threads=threads,
        attention_by_products=by_products and _can_pack(job) and has_plain_attention(job.model),
    )
    options = options.as_begun(kept)
    kind = "cuda" if job.device.type == "cuda" else "cpu"
    if lengths is None:
        if job.max_tokens is not None:
            raise ValueError(
                "max_tokens has no effect on samples without a length in tokens, such as images; "
                "pass batch_size"
            )
        batch_size = options.batch_size or _BATCH_SIZE[kind]
        options = replace(options, max_tokens=None, batch_size=batch_size, shared_prompts=0)
        plan = plan_fixed(len(job.dataset), batch_size=batch_size)
        return replace(plan, options=options)
    max_tokens = options.max_tokens or _MAX_TOKENS[kind]
    # A store that was begun without them goes on without them.
    shares = not kept or options.shared_prompts > 0
    groups, savings = _prompt_groups(job, options.prefix) if shares else (None, None)
    num_saved = 0 if savings is None else int(savings.sum())
    options = replace(options, max_tokens=max_tokens, shared_prompts=num_saved)
    plan = plan_padded(
        lengths,
        max_tokens=max_tokens,
        batch_size=options.batch_size,
        groups=groups,
        saved=options.prefix if savings is None else options.prefix + savings,
    )
    return replace(plan, options=options)


def _check_options(job: Job, kept: Mapping[str, Any]) -> None:
    """Refuse options that a store's packs, which are kept, were not made with."""
    for name in ("max_tokens", "batch_size", "compile"):
        asked = getattr(job, name)
        if asked not in (None, "auto") and asked != kept.get(name, asked):
            raise ScoreMismatchError(
                f"{name}={asked} has no effect on a store that was begun with {name}={kept[name]}, "
                "whose packs are kept; leave it out to go on, or score into another folder, or "
                "delete this one if its losses are unwanted"
            )


def _prompt_groups(job: Job, prefix: int) -> tuple[Tensor | None, Tensor | None]:
    """Return which samples share a prompt, and how many tokens that saves each on average.

    Both are None where that saves nothing. Nothing is looked for where the user gave the lengths:
    that was to spare reading all samples.
    """
    can_share = _can_pack(job) and job.lengths is None
    sharing = shared_prompts(job.dataset) if can_share else None
    if sharing is None:
        return None, None
    groups, prompt_lengths = sharing
    group_sizes = groups.bincount()[groups]
    # A prompt that k samples share is run once instead of k times: each saves (k − 1)/k of it.
    savings = (prompt_lengths - prefix).clamp_min(0) * (group_sizes - 1) // group_sizes
    return (groups, savings) if savings.any() else (None, None)


def _can_pack(job: Job) -> bool:
    return job.loss == "causal_lm" and not why_not_packed(job.model, job.loss)


def _compiles(job: Job, lengths: Tensor | None, compiling_gains: bool) -> bool:
    if job.compile != "auto":
        return job.compile
    if lengths is None or not compiling_gains:
        return False
    tokens = int(lengths.sum()) - len(job.prefix) * len(lengths)
    return pays(job.model, tokens, job.device)


def check_same_call(ranks: Ranks, identity: dict[str, Any], *, has_store: bool) -> None:
    """Refuse ranks that score other things, or of which only some have a store."""
    calls = ranks.gather("identity", [identity, has_store])
    for rank, (other_identity, other_has_store) in enumerate(calls):
        check_identity(other_identity, identity, f"rank {rank}'s call", SAME_CALL)
        if other_has_store != has_store:
            raise ValueError(f"store must be given on all ranks or none, as rank {rank}")
