"""A job scored by all ranks together: in memory, or into a store that it can go on from."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from contextlib import nullcontext, suppress
from pathlib import Path
from time import sleep
from typing import TypeVar

import torch

from flowdata._common.notices import logger, say
from flowdata.errors import StoreError
from flowdata.models.placement import is_sharded
from flowdata.scores import Scores
from flowdata.scoring.job import Job, make_plan
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.ranks import Ranks
from flowdata.scoring.run import run_packs
from flowdata.store.folder import finish, locked, read_manifest
from flowdata.store.format import Manifest, make_manifest, write_manifest
from flowdata.store.identity import check_identity
from flowdata.store.packs import Columns, join, reorder, split
from flowdata.store.parts import FinishedPacks, PartWriter
from flowdata.store.repair import read_finished_packs, repair_manifest

ALIKE = "All ranks have to make the same call"
_SECONDS_TO_SHOW = 60  # that a shared file system may take to show one host another's files
T = TypeVar("T")


def score_packs(job: Job, draft: Manifest, ranks: Ranks) -> Scores:
    """Score all packs, keeping them in memory."""
    plan, manifest = _shared_plan(job, draft, None, ranks)
    kept = FinishedPacks()
    for pack, columns, skipped in run_packs(job, plan, range(len(plan)), ranks):
        kept.add({pack: columns}, skipped)
    ranks.gather("done", True)
    if ranks.size > 1 and not is_sharded(job.model):
        mine = sorted(kept.packs)
        joined = join([kept.packs[pack] for pack in mine]) if mine else {}
        for packs, columns, skipped in ranks.exchange((mine, joined, kept.skipped)):
            cut = split(columns, plan.sizes[packs]) if packs else []
            kept.add(dict(zip(packs, cut, strict=True)), skipped)
    return _merged(plan, kept, manifest)


def score_into(folder: Path, job: Job, draft: Manifest, ranks: Ranks) -> Scores:
    """Take from a store what is there, and score and add what is not."""
    scores = _finished(folder, draft) if ranks.is_first else None
    with locked(folder) if ranks.is_first and scores is None else nullcontext():
        if ranks.is_first and scores is None:  # perhaps another process has just finished
            scores = _finished(folder, draft)
        if ranks.from_first("finished", scores is not None):
            job.announce(f"losses of {len(job.dataset):,} samples found in {folder}")
        else:
            scores = _score_missing(folder, job, draft, ranks)
    return _shown(lambda: Scores.load(folder), ranks) if scores is None else scores


def _finished(folder: Path, draft: Manifest) -> Scores | None:
    """The scores of a finished and whole store."""
    try:
        scores = Scores.load(folder)
    except (StoreError, FileNotFoundError, NotADirectoryError):
        return None
    check_identity(scores.metadata["identity"], draft["identity"], f"the store {folder}")
    with suppress(OSError):  # a folder that can only be read will do
        repair_manifest(folder)
    return scores


def _score_missing(folder: Path, job: Job, draft: Manifest, ranks: Ranks) -> Scores | None:
    """Score the packs that a store does not have, and finish it on rank 0, which gets scores."""
    begun = read_manifest(folder) if ranks.is_first else None
    if begun is not None:
        check_identity(begun["identity"], draft["identity"], f"the store {folder}")
    plan, manifest = _shared_plan(job, draft, begun, ranks)
    kept = FinishedPacks()
    if ranks.is_first:
        write_manifest(folder, manifest)
        kept = read_finished_packs(folder, manifest, plan.order, plan.sizes)
    missing = [pack for pack in range(len(plan)) if pack not in kept.packs]
    todo = ranks.from_first("todo", missing)
    done = sum(int(plan.sizes[pack]) for pack in kept.packs)
    del kept
    writes = ranks.is_first or not is_sharded(job.model)
    try:
        with PartWriter(folder, manifest) if writes else nullcontext() as writer:
            for pack, columns, skipped in run_packs(job, plan, todo, ranks):
                if writer is not None:
                    writer.add(pack, columns, skipped)
                    done += len(columns["loss"])
    except BaseException:
        least = "at least " if ranks.size > 1 else ""
        say(
            f"stopped with {least}{done:,} of {len(job.dataset):,} samples kept in {folder}; "
            "the same call goes on from there",
            shown=job.progress,
        )
        raise
    ranks.gather("done", True)
    scores = None
    if ranks.is_first:
        kept = _shown(lambda: _all_kept(folder, manifest, plan), ranks)
        scores = _merged(plan, kept, manifest)
        finish(folder, scores.to_tensors(), scores.manifest(), plan.order, plan.sizes)
    ranks.from_first("merged", True)
    return scores


def _shared_plan(
    job: Job, draft: Manifest, begun: Manifest | None, ranks: Ranks
) -> tuple[Plan, Manifest]:
    """Return rank 0's plan, which every rank makes for itself, and the manifest with it."""
    begun = ranks.from_first("begun", begun)
    threads = ranks.from_first("threads", torch.get_num_threads())
    plan = make_plan(job, begun["plan"] if begun else {}, threads)
    if begun:
        check_identity(begun["plan"], plan.describe(), "the store")
    manifest: Manifest = begun or {**draft, "plan": plan.describe()}
    manifest = ranks.from_first("manifest", manifest)
    check_identity(manifest["plan"], plan.describe(), "rank 0's plan", ALIKE)
    return plan, manifest


def _all_kept(folder: Path, manifest: Manifest, plan: Plan) -> FinishedPacks:
    kept = read_finished_packs(folder, manifest, plan.order, plan.sizes)
    if len(kept.packs) < len(plan):
        raise StoreError(
            f"{len(plan) - len(kept.packs)} packs that were just written are not in {folder}; all "
            "ranks have to write into one folder, on a file system that they share. Call again"
        )
    return kept


def _merged(plan: Plan, kept: FinishedPacks, manifest: Manifest) -> Scores:
    named = {name: manifest[name] for name in ("identity", "plan", "details")}
    return merge_packs(plan, kept.packs, make_manifest(**named, skipped=kept.skipped))


def _shown(read: Callable[[], T], ranks: Ranks) -> T:
    """What `read` gives, once the file system shows what other ranks wrote."""
    for _ in range(_SECONDS_TO_SHOW if ranks.size > 1 else 0):
        with suppress(StoreError, FileNotFoundError):
            return read()
        sleep(1)
    return read()


def merge_packs(plan: Plan, packs: Mapping[int, Columns], manifest: Manifest) -> Scores:
    """Return the packs' columns in data set order; say how many samples have no loss."""
    columns = reorder(join([packs[index] for index in range(len(plan))]), plan.order.argsort())
    scores = Scores(
        columns.pop("loss"),
        columns.pop("count"),
        metadata=dict(manifest),
        token_losses=columns.pop("token_loss", None),
        columns=columns,
    )
    missing = scores.losses.isnan()
    if missing.any():
        logger.warning(
            "%d of %d samples have no loss: %d without a target, %d with a non-finite loss; "
            "the first is sample %d. weights(missing='zero') gives them weight 0",
            int(missing.sum()),
            len(scores),
            int((scores.counts == 0).sum()),
            int((missing & (scores.counts > 0)).sum()),
            int(missing.int().argmax()),
        )
    return scores
