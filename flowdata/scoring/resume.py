"""A job scored by all ranks together: in memory, or into a store from which it can go on."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import nullcontext, suppress
from dataclasses import asdict, replace
from functools import partial
from time import sleep
from typing import Any, TypeVar

import torch
from torch import Tensor

from flowdata._common.notices import is_first_time, logger, say
from flowdata.errors import DisagreementError, SampleError, StoreError
from flowdata.models.placement import is_sharded
from flowdata.report.guessing import guessing_remark
from flowdata.report.markdown import count
from flowdata.scores import Scores
from flowdata.scoring.job import Job
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.planning import shared_plan
from flowdata.scoring.ranks import Ranks
from flowdata.scoring.run import CheckReport, run_packs
from flowdata.store.folder import SCORES, finish, locked, read_manifest, update_details
from flowdata.store.format import Manifest, make_manifest, skipped_in, write_manifest
from flowdata.store.identity import check_identity, sampling_note
from flowdata.store.packs import Columns, join, restore, split
from flowdata.store.parts import FinishedPacks, PartWriter, parts_of
from flowdata.store.places import Place
from flowdata.store.repair import read_finished_packs, repair_manifest

_SECONDS_TO_SHOW = 60  # that a shared file system may take to show one host another's files
T = TypeVar("T")


def score_in_memory(job: Job, draft: Manifest, ranks: Ranks) -> Scores:
    """Return the scores of a job that keeps nothing on disk.

    Args:
        job: the job.
        draft: the manifest of this call, with an empty plan.
        ranks: the ranks that share the call.
    """
    plan, manifest = shared_plan(job, draft, None, ranks)
    packs, report = FinishedPacks(), CheckReport()
    for pack in run_packs(job, plan, range(len(plan)), ranks, report):
        packs.add({pack.number: pack.columns}, pack.skipped)
    manifest["checked"] = _gather_checks(report, ranks)
    if ranks.size > 1 and not is_sharded(job.model):
        _exchange_packs(packs, plan, ranks)
    scores = merge_packs(plan, lambda: [packs], manifest)
    _warn_of_guessing(scores, ranks)
    return scores


def _gather_checks(report: CheckReport, ranks: Ranks) -> dict[str, Any]:
    """What all ranks have checked, once each of them is done."""
    whole = CheckReport()
    mine = [report.samples, report.largest_difference, report.num_classes]
    for samples, largest, num_classes in ranks.gather("done", mine):
        whole.add(samples, largest)
        whole.num_classes = num_classes  # the same on every rank: each checks the same samples
    return asdict(whole)


def _exchange_packs(packs: FinishedPacks, plan: Plan, ranks: Ranks) -> None:
    """Add the packs that the other ranks have run."""
    indices = sorted(packs.packs)
    # Joined columns are sent as a few tensors, where packs would be thousands of small ones.
    columns = join([packs.packs[index] for index in indices]) if indices else {}
    for others, other_columns, skipped in ranks.exchange((indices, columns, packs.skipped)):
        cut_packs = split(other_columns, plan.sizes[others]) if others else []
        packs.add(dict(zip(others, cut_packs, strict=True)), skipped)


def score_into_store(folder: Place, job: Job, draft: Manifest, ranks: Ranks) -> Scores:
    """Return the scores that a store has, or will have once the packs it lacks are scored.

    Args:
        folder: the store, perhaps not begun yet.
        job: the job.
        draft: the manifest of this call, with an empty plan.
        ranks: the ranks that share the call.

    Raises:
        ScoreMismatchError: the store is of another model, data set, loss or option.
        SampleError: it has samples that were skipped, and the job skips none.
        StoreError: the folder is no store, or packs that other ranks wrote don't appear in it.
    """
    scores = _finished_scores(folder, job, draft) if ranks.is_first else None
    if ranks.is_first and scores is None:
        with suppress(StoreError):  # which is said, or mended, under the lock
            _same_manifest(folder, draft)  # another model's call would else wait for the lock
    with locked(folder) if ranks.is_first and scores is None else nullcontext():
        if ranks.is_first and scores is None:
            # Another process may have held the lock until now, and finished the store.
            scores = _finished_scores(folder, job, draft)
        if ranks.from_first("finished", scores is not None):
            _warn_of_sampling(folder, draft, ranks)
            job.announce(f"losses of {count(len(job.dataset), 'sample')} found in {folder}")
        else:
            scores = _score_the_rest(folder, job, draft, ranks)
    if ranks.is_first and scores is not None and draft["details"]:
        with suppress(OSError, StoreError):  # a place that can only be read keeps its notes
            update_details(folder, draft["details"])
        scores.metadata["details"] = draft["details"]
    ranks.from_first("noted", True)
    if scores is None:
        scores = _once_visible(lambda: Scores.load(folder), ranks)
    _warn_of_guessing(scores, ranks)
    return scores


def _finished_scores(folder: Place, job: Job, draft: Manifest) -> Scores | None:
    """The scores of a finished and whole store; None where there are none yet."""
    try:
        scores = Scores.load(folder)
    except (StoreError, FileNotFoundError, NotADirectoryError):
        return None
    check_identity(scores.metadata["identity"], draft["identity"], f"the store {folder}")
    _check_skipped(folder, job, skipped_in(scores.manifest()))
    with suppress(OSError):  # a folder that can only be read will do
        repair_manifest(folder)
    return scores


def _warn_of_sampling(folder: Place, draft: Manifest, ranks: Ranks) -> None:
    """Warn once for a data set where losses are returned of samples not all of which were compared.

    The announcement need not say so again.
    """
    identity = draft["identity"]["dataset"]
    note = sampling_note(identity)
    if ranks.is_first and note and is_first_time(f"found: {identity}"):
        is_first_time(identity)
        logger.warning(
            "the losses in %s are returned as they are: %s, so that a change to others goes "
            "unnoticed; if you changed any, score into another folder",
            folder,
            note,
        )


def _check_skipped(folder: Place, job: Job, skipped: Mapping[int, str]) -> None:
    """Refuse a store with samples that an earlier call skipped, where this one is to skip none."""
    if skipped and not job.dataset.skip:
        first = min(skipped)
        raise SampleError(
            f"{folder} keeps {len(skipped)} of {len(job.dataset)} samples without a loss, which "
            f"on_error='skip' left out, dataset[{first}] first: {skipped[first]}; pass "
            "on_error='skip' to take them so, or mend the samples and score into another folder"
        )


def _score_the_rest(folder: Place, job: Job, draft: Manifest, ranks: Ranks) -> Scores | None:
    """Score the packs that a store lacks, and finish it on rank 0, which gets the scores.

    Rank 0 reads the store and tells the others what is to be done; each rank writes parts of its
    own; rank 0 reads all parts once every rank is through, and merges them.
    """
    begun = _begun_manifest(folder, draft) if ranks.is_first else None
    suspects = ranks.from_first("suspects", [] if begun is None else begun.get("suspects", []))
    job = replace(job, suspects=(*job.suspects, *suspects))
    plan, manifest = shared_plan(job, draft, begun, ranks)
    lacking = _begin(folder, job, plan, manifest) if ranks.is_first else None
    todo: list[int] = ranks.from_first("todo", lacking)
    report = CheckReport()
    _write_parts(folder, job, plan, manifest, todo, ranks, report)
    checked = _gather_checks(report, ranks)
    scores = None
    if ranks.is_first:
        read = partial(read_finished_packs, folder, manifest, plan.order, plan.sizes)
        merge = partial(merge_packs, plan, read, {**manifest, "checked": checked})
        scores = _once_visible(merge, ranks)
        finish(folder, scores.to_tensors(), scores.manifest(), plan.order, plan.sizes)
    ranks.from_first("merged", True)
    return scores


def _begun_manifest(folder: Place, draft: Manifest) -> Manifest | None:
    """The manifest of a store that goes on, without a plan where nothing of it is kept yet."""
    begun = _same_manifest(folder, draft)
    if begun is None:
        return None
    begun = _without_wrong_parts(folder, begun)
    is_kept = (folder / SCORES).exists() or bool(parts_of(folder))
    return {
        **begun,
        "plan": begun["plan"] if is_kept else {},
        "details": draft["details"] or begun["details"],
    }


def _same_manifest(folder: Place, draft: Manifest) -> Manifest | None:
    """The manifest of a store, which has to be of the draft's identity; None of a new one."""
    begun = read_manifest(folder)
    if begun is not None:
        check_identity(begun["identity"], draft["identity"], f"the store {folder}")
    return begun


def _without_wrong_parts(folder: Place, begun: Manifest) -> Manifest:
    """Remove the parts of a run that a checked sample proved wrong; it is known once, by its name.

    The sample stays in the manifest, so that every later call checks it before its run.
    """
    if not begun.get("is_wrong", False):
        return begun
    parts = parts_of(folder)
    for part in parts:
        part.unlink()
    logger.warning(
        "the way by which %s was begun gave sample %s a wrong loss: what it made is scored again",
        folder,
        begun["suspects"][-1],
    )
    manifest: Manifest = {**begun, "is_wrong": False}
    write_manifest(folder, manifest)
    return manifest


def _begin(folder: Place, job: Job, plan: Plan, manifest: Manifest) -> list[int]:
    """Write the manifest, without which parts mean nothing; return the packs that are lacking."""
    write_manifest(folder, manifest)
    is_there = torch.zeros(len(plan), dtype=torch.bool)
    for finished in read_finished_packs(folder, manifest, plan.order, plan.sizes):
        _check_skipped(folder, job, finished.skipped)
        is_there[list(finished.packs)] = True
    if is_there.any():
        kept = int(plan.sizes[is_there].sum())
        are = "is" if kept == 1 else "are"
        say(f"{kept:,} of {len(job.dataset):,} samples {are} there already", shown=job.progress)
    lacking: list[int] = (~is_there).nonzero().flatten().tolist()
    return lacking


def _write_parts(
    folder: Place,
    job: Job,
    plan: Plan,
    manifest: Manifest,
    todo: Sequence[int],
    ranks: Ranks,
    report: CheckReport,
) -> None:
    """Score this rank's share of packs into parts; say of an error how much is kept."""
    samples_kept = len(job.dataset) - int(plan.sizes[list(todo)].sum())
    # Ranks that hold a model together all get the losses of every pack: one of them writes.
    writes = ranks.is_first or not is_sharded(job.model)
    try:
        with PartWriter(folder, manifest) if writes else nullcontext() as writer:
            for pack in run_packs(job, plan, todo, ranks, report):
                if writer is not None:
                    writer.add(pack.number, pack.columns, pack.skipped)
                    samples_kept += len(pack.columns["loss"])
    except DisagreementError as error:
        suspects = [*job.suspects, error.sample]
        write_manifest(folder, {**manifest, "suspects": suspects, "is_wrong": True})
        raise
    except BaseException:
        at_least = "at least " if ranks.size > 1 else ""
        then = "the same call goes on from there"
        if not (samples_kept or at_least):
            size = "batch_size" if plan.options.max_tokens is None else "max_tokens"
            then = f"the same call begins again, and with a smaller {size}=N keeps something sooner"
        say(
            f"stopped with {at_least}{samples_kept:,} of {len(job.dataset):,} samples kept in "
            f"{folder}; {then}",
            shown=job.progress,
        )
        raise


def _once_visible(read: Callable[[], T], ranks: Ranks) -> T:
    """What `read` returns, once the file system shows what other ranks wrote."""
    for _ in range(_SECONDS_TO_SHOW if ranks.size > 1 else 0):
        with suppress(StoreError, FileNotFoundError):
            return read()
        sleep(1)
    return read()


def merge_packs(
    plan: Plan, read: Callable[[], Iterable[FinishedPacks]], manifest: Manifest
) -> Scores:
    """Return all packs' losses in data set order, and say how many samples have none.

    Args:
        plan: the packs.
        read: gives the finished packs, all of them, anew each time it is called.
        manifest: the store's.

    Raises:
        StoreError: a pack is lacking.
    """
    skipped: dict[int, str] = {}
    is_there = torch.zeros(len(plan), dtype=torch.bool)

    def packs() -> Iterator[tuple[Tensor, Columns]]:
        for finished in read():
            skipped.update(finished.skipped)
            for number, columns in finished.packs.items():
                is_there[number] = True
                yield plan.pack(number), columns
        if not is_there.all():
            raise StoreError(
                f"{int((~is_there).sum())} of {len(plan)} packs that were just scored are not "
                "there; all ranks have to write into one folder, on a file system that they "
                "share. Call again"
            )

    columns = restore(packs, len(plan.order))
    fields = {name: manifest[name] for name in ("identity", "plan", "details")}
    scores = Scores(
        columns.pop("loss"),
        columns.pop("count"),
        metadata=dict(make_manifest(**fields, skipped=skipped, checked=manifest.get("checked"))),
        token_losses=columns.pop("token_loss", None),
        columns=columns,
    )
    _warn_of_missing(scores)
    return scores


def _warn_of_missing(scores: Scores) -> None:
    has_no_loss = scores.losses.isnan()
    if has_no_loss.any():
        logger.warning(
            "%d of %d samples have no loss: %d without a target, %d with a non-finite loss, "
            "%d that can't be read; the first is sample %d. weights(missing='zero') gives them "
            "weight 0",
            int(has_no_loss.sum()),
            len(scores),
            int((scores.counts == 0).sum()) - len(scores.metadata["skipped"]),
            int((has_no_loss & (scores.counts > 0)).sum()),
            len(scores.metadata["skipped"]),
            int(has_no_loss.int().argmax()),
        )


def _warn_of_guessing(scores: Scores, ranks: Ranks) -> None:
    remark = guessing_remark(scores.losses, scores.metadata)
    if remark and ranks.is_first:
        logger.warning(remark)
