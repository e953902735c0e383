"""Stores of data that grows: the losses that are there are kept, and new samples alone are scored.

    scores/         losses of the first samples, complete
    scores/new/     while a store grows: a store of the samples after them

Once all new samples are scored, both become one file, which takes the place of the first.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from flowdata._common.notices import say
from flowdata.errors import StoreError
from flowdata.scores import Scores
from flowdata.scoring.ranks import Ranks, ranks_of_this_call
from flowdata.scoring.scorer import LossScorer
from flowdata.store.folder import LOCK, SCORES, locked, read_manifest
from flowdata.store.format import (
    MANIFEST,
    OldFormatError,
    layout_of,
    make_manifest,
    skipped_in,
    write_file,
    write_manifest,
)
from flowdata.store.parts import PARTS
from flowdata.store.places import Place, names_in, remove_folder
from flowdata.text.tokens import TokenSamples

REPORT = "report"  # the folder in a store that `flowdata report` writes
_NEW = "new"


def score_growing(
    scorer: LossScorer, samples: TokenSamples, store: Place, **options: Any
) -> Scores:
    """Return the scores of samples; a store that has the first of them is extended by the others.

    Args:
        scorer: scores them.
        samples: all of them.
        store: the folder, perhaps not there yet.
        options: as `LossScorer.score`, on_error and details.

    Raises:
        ScoreMismatchError: the store is of other samples, or of another model or option.
    """
    ranks = ranks_of_this_call(shared=True)
    with ranks.failing_together():
        count: int = ranks.from_first("kept", _count_kept(store, samples, ranks))
        ranks.leave()
    if count == 0:
        return _score(scorer, samples, store, options)
    say(
        f"{store} has the first {count:,} of {len(samples):,} samples; "
        f"{len(samples) - count:,} new ones are scored",
        shown=scorer.progress and ranks.is_first,
    )
    old = _score(scorer, samples.part(0, count), store, options)
    new = score_growing(scorer, samples.part(count, len(samples)), store / _NEW, **options)
    joined = _joined(old, new, samples.identity(), options.get("details") or {})
    ranks = ranks_of_this_call(shared=True)
    with ranks.failing_together():
        if ranks.is_first:
            _write(joined, store)
        ranks.from_first("written", True)
        ranks.leave()
    return joined


def remove_store(store: Place) -> None:
    """Remove the losses that a store keeps, and the report on them.

    Raises:
        StoreError: there is something else at `store`, or a damaged one.
        ValueError: the folder holds other files beside the store's; nothing is removed.
    """
    ranks = ranks_of_this_call(shared=True)
    with ranks.failing_together():
        if ranks.is_first and _is_there(store):
            with locked(store):
                _remove_files(store)
        ranks.from_first("removed", True)
        ranks.leave()


def _is_there(store: Place) -> bool:
    try:
        return read_manifest(store) is not None
    except OldFormatError:
        return True


def _remove_files(store: Place) -> None:
    folders, files = (PARTS, _NEW, REPORT), (SCORES, MANIFEST)
    others = set(names_in(store)) - {*folders, *files, LOCK}
    if others:
        raise ValueError(
            f"--overwrite removes a store's own files, and {store} holds {min(others)} too; move "
            "that, or score into another folder"
        )
    for folder in folders:
        remove_folder(store / folder)
    for file in files:
        (store / file).unlink(missing_ok=True)


def _count_kept(store: Place, samples: TokenSamples, ranks: Ranks) -> int:
    """How many samples, from the first, a store of some but not all of them has; 0: it is none."""
    if not ranks.is_first:
        return 0
    manifest = read_manifest(store)
    if manifest is not None and not manifest["plan"]:
        _check_whole(store)
    identity = {} if manifest is None else manifest["identity"]
    count = identity.get("num_samples", 0)
    is_beginning = 0 < count <= len(samples) and (
        identity["dataset"] == samples.part(0, count).identity()
    )
    if store.name == _NEW and manifest is not None and not is_beginning:
        remove_folder(store)  # the draft of another extension that was stopped
    return count if is_beginning and count < len(samples) else 0


def _check_whole(store: Place) -> None:
    """Raise StoreError for a store that grew and is damaged: its packs are not known any more."""
    try:
        Scores.load(store)
    except StoreError as error:
        raise StoreError(
            f"{error}. The store grew with its data, and no part of it can be repaired; "
            "--overwrite scores all samples again"
        ) from None


def _score(
    scorer: LossScorer, samples: TokenSamples, store: Place, options: Mapping[str, Any]
) -> Scores:
    return scorer.score(samples, store=store, dataset_id=samples.identity(), **options)


def _joined(old: Scores, new: Scores, dataset_id: str, details: Mapping[str, Any]) -> Scores:
    """The scores of all samples, those of the old ones first."""
    first, then = old.manifest(), new.manifest()
    count = len(old) + len(new)
    skipped = skipped_in(first) | {len(old) + i: why for i, why in skipped_in(then).items()}
    checks = [manifest.get("checked", {}) for manifest in (first, then)]
    checked = {
        **checks[0],
        **checks[1],
        "samples": sum(check.get("samples", 0) for check in checks),
        "largest_difference": max(check.get("largest_difference", 0.0) for check in checks),
    }
    identity = {**then["identity"], "dataset": dataset_id, "num_samples": count}
    token_losses: list[Tensor] = [
        scores.flat_token_losses for scores in (old, new) if scores.flat_token_losses is not None
    ]
    return Scores(
        torch.cat([old.losses, new.losses]),
        torch.cat([old.counts, new.counts]),
        metadata=dict(make_manifest(identity, {}, details, skipped, checked)),
        token_losses=torch.cat(token_losses) if token_losses else None,
        columns={name: torch.cat([old.columns[name], new.columns[name]]) for name in new.columns},
    )


def _write(scores: Scores, store: Place) -> None:
    """Put joined scores in the place of a store's own; the file is replaced whole."""
    with locked(store):
        write_file(store / SCORES, scores.to_tensors(), scores.manifest())
        write_manifest(store, {**scores.manifest(), "layout": layout_of(store / SCORES)})
        remove_folder(store / _NEW)
