"""The store: a folder that keeps losses while they are made and once they are complete.

    scores/
        scores.safetensors    once complete: all that a reader needs
        manifest.json         what the scores are of; written before the first part
        parts/*.safetensors   while scoring: what is done so far, removed at the end
        .lock                 while scoring: who scores

**scores.safetensors** is a plain safetensors file, readable without this library:

    loss            float32 (N,)    each sample's mean loss over its targets; NaN: it has none
    count           int64 (N,)      its number of targets
    token_loss      float32 (Σcount,)   optional: the targets' losses, sample after sample
    token_offset    int64 (N+1,)    with token_loss: where each sample's targets begin
    pack_checksum   int64 (packs,)  optional: for repair, see below
    any other       float32 (N,)    a further column, such as entropy or gradient_norm

**A part** holds whole packs of the plan, one after another, samples in the plan's order:

    pack            int64 (K,)      which packs
    loss, count     as above, for the packs' samples; token_loss and further columns optional

**Metadata.** Both kinds carry one string, `flowdata`, in the safetensors header: canonical JSON
(sorted keys, no spaces) of `manifest`, the signed manifest, and `content`, the hex SHA-256 over the
canonical JSON of that and then, for each tensor in name order, `name|dtype|shape` in torch's words
and the tensor's little-endian bytes.

**The signed manifest** has the fields below and `checksum`, the hex SHA-256 over the canonical
JSON of the others. manifest.json holds the same, indented.

    format     2; other versions are refused
    flowdata   the version that wrote it
    identity   what must agree for losses to be reused: model, dataset, loss, dtype, …
    plan       how the data set is cut into packs: max_tokens, batch_size, packs, digest, …; and
               threads, with which each process computes: last bits depend on both
    details    anything a reader may want to know (the data file, …)
    skipped    {"index": reason} of samples that could not be read; in a part, of its own
    layout     in manifest.json of a complete store alone: {tensor: [dtype, first byte, end]} of
               scores.safetensors, bytes counted from the file's begin

**What survives what.** The *store digest*, SHA-256 over format, identity and plan, says what
belongs together. Every file is written under another name, synced and renamed, so a reader sees
all of it or nothing. A part that is torn, truncated, changed, duplicated or foreign is left out,
with a warning, and only its packs are scored again. A lost manifest.json is taken from any whole
file. Of a damaged scores.safetensors those packs are kept whose `pack_checksum` agrees: the first
8 bytes, little-endian, of BLAKE2b keyed with the store digest over the pack's number (8 bytes,
little-endian) and the bytes of its samples' values, column by column in name order. The plan says
which samples a pack has. Files are data: nothing in them is run, no name in them is a path.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata.scores import ScoreMismatchError, Scores
from flowdata.store.format import (
    FIELDS,
    MANIFEST,
    Manifest,
    StoreError,
    layout_of,
    make_manifest,
    manifest_in,
    read_file,
    store_digest,
    tensors_at,
    write_file,
    write_manifest,
)
from flowdata.store.lock import lock
from flowdata.store.packs import Columns, checksums, places, reorder, split
from flowdata.store.parts import PARTS, Kept, packs_of_part, parts_of

SCORES, LOCK = "scores.safetensors", ".lock"
_OWN = {"loss", "count", "token_loss", "token_offset", "pack_checksum"}  # others: further columns
logger = logging.getLogger("flowdata")


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a store, None for a folder that is empty or not there yet.

    Raises:
        StoreError: the folder holds other things, or no manifest in it can be read.
    """
    check_folder(folder)
    problem: StoreError | None = None
    for file in (folder / MANIFEST, folder / SCORES, *parts_of(folder)):
        try:
            return manifest_in(file)
        except FileNotFoundError:
            continue
        except StoreError as error:
            logger.warning("%s", error)
            problem = problem or error
    if problem is not None:
        raise problem
    return None


def check_folder(folder: Path) -> None:
    """Raise StoreError unless a store is at `folder`, or could be begun there."""
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; a store is a folder: pass another path")
    if (folder / PARTS).is_symlink():
        raise StoreError(f"{folder / PARTS} is a link: a store keeps its parts in itself")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if not name.startswith((LOCK, f".{SCORES}", f".{MANIFEST}"))]
    if foreign and not {SCORES, MANIFEST}.intersection(foreign) and not parts_of(folder):
        raise StoreError(
            f"{folder} is not a flowdata store: it has no {MANIFEST}, but holds {foreign[0]}"
            f"{' and more' if len(foreign) > 1 else ''}; pass an empty or a new folder"
        )


def load_scores(path: Path) -> Scores:
    """Return the scores of a finished store, or of a file written by `save_scores`."""
    if not path.exists():
        raise FileNotFoundError(f"there is no store at {path}")
    file = path / SCORES if path.is_dir() else path
    if not file.exists():
        manifest = read_manifest(path)
        if manifest is None:
            raise StoreError(f"{path} is empty: it is not a store yet")
        raise StoreError(
            f"{path} is not finished: call LossScorer.score with store={str(path)!r} again, "
            "it goes on where it stopped"
        )
    tensors, manifest = read_file(file)
    if "pack" in tensors or not {"loss", "count"} <= tensors.keys():
        raise StoreError(f"{file} is no file of scores: it lacks a loss and count of each sample")
    try:
        return Scores(
            tensors["loss"],
            tensors["count"],
            metadata=manifest,
            token_losses=tensors.get("token_loss"),
            columns={name: tensors[name] for name in tensors.keys() - _OWN},
        )
    except (ValueError, TypeError) as error:
        raise StoreError(f"{file} is damaged: {error}") from None


def save_scores(scores: Scores, path: Path) -> Path:
    """Write scores as a finished store, or as one file if `path` ends in `.safetensors`.

    Raises:
        ScoreMismatchError: the folder is the store of other scores, finished or begun.
    """
    manifest, file = _manifest_of(scores), path
    if path.suffix != ".safetensors":
        kept, file = read_manifest(path), path / SCORES
        if kept is not None and kept["identity"] != manifest["identity"]:
            raise ScoreMismatchError(
                f"{path} holds the scores of another data set, model or option; save into another "
                "folder, or delete this one if its losses are unwanted"
            )
    write_file(file, _tensors_of(scores), manifest)
    return path


def finish(folder: Path, scores: Scores, order: Tensor, sizes: Tensor) -> None:
    """Write the complete scores, then remove the parts they were merged from.

    Args:
        folder: the store.
        scores: in data set order.
        order: (N,) int64, the plan's.
        sizes: (packs,) int64, the plan's.
    """
    manifest, tensors = _manifest_of(scores), _tensors_of(scores)
    of_samples = {name: tensors[name] for name in tensors.keys() - {"token_offset"}}
    tensors["pack_checksum"] = checksums(reorder(of_samples, order), sizes, store_digest(manifest))
    write_file(folder / SCORES, tensors, manifest)
    write_manifest(folder, {**manifest, "layout": layout_of(folder / SCORES)})
    for part in parts_of(folder):
        part.unlink()
    with suppress(OSError):  # it isn't there, or somebody's files are in it
        (folder / PARTS).rmdir()


def repair_manifest(folder: Path) -> None:
    """Write manifest.json anew from a whole scores.safetensors, should it be missing or damaged."""
    try:
        manifest_in(folder / MANIFEST)
    except (StoreError, OSError):
        file = folder / SCORES
        write_manifest(folder, {**manifest_in(file), "layout": layout_of(file)})


def verify_store(folder: Path) -> dict[str, str]:
    """Return, for each file of a store, "whole" or what is wrong with it.

    Raises:
        FileNotFoundError: there is no folder.
        StoreError: it is not a store.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no store at {folder}")
    check_folder(folder)
    files = [file for file in (folder / SCORES, folder / MANIFEST) if file.exists()]
    findings = {
        str(file.relative_to(folder)): _state(file, folder) for file in [*files, *parts_of(folder)]
    }
    if not (folder / SCORES).exists():
        findings[SCORES] = "not there yet: scoring is not finished" if findings else "not there"
    return findings


def _state(file: Path, folder: Path) -> str:
    try:
        if file.name == MANIFEST:
            identity = manifest_in(file)["identity"]
            if (folder / SCORES).exists() and _identity_in(folder / SCORES) not in (None, identity):
                return f"{file} belongs to other scores than {SCORES}"
        elif file.name == SCORES:
            load_scores(file)
        else:
            manifest = read_file(file)[1]
            if store_digest(manifest) != store_digest(read_manifest(folder) or manifest):
                return f"{file} belongs to another store"
    except (StoreError, OSError) as error:
        return str(error)
    return "whole"


def _identity_in(file: Path) -> Any:
    """The identity that a file of scores tells; None if it is damaged."""
    try:
        return manifest_in(file)["identity"]
    except (StoreError, OSError):
        return None


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the store's lock for a block, without what a killed process left half written."""
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, what=f"scoring into {folder}"):
        for name in (f".{SCORES}.*", f".{MANIFEST}.*", f"{PARTS}/.*.safetensors.*"):
            for draft in folder.glob(name):
                draft.unlink(missing_ok=True)
        yield


def read_kept(folder: Path, manifest: Manifest, order: Tensor, sizes: Tensor) -> Kept:
    """Return every pack that earlier runs finished and that can be trusted.

    Args:
        folder: the store.
        manifest: its manifest.
        order: (N,) int64, the plan's.
        sizes: (packs,) int64, the plan's samples in each pack.
    """
    kept = Kept()
    for file in parts_of(folder):
        try:
            kept.add(*packs_of_part(file, store_digest(manifest), sizes))
        except (StoreError, OSError) as error:
            logger.warning("%s; what it held is scored again", error)
    if (folder / SCORES).exists():
        skipped = {int(index): reason for index, reason in manifest["skipped"].items()}
        salvaged = _packs_of_damaged(folder / SCORES, manifest, order, sizes)
        logger.warning("%d of %d packs of %s are whole", len(salvaged), len(sizes), folder / SCORES)
        kept.add(salvaged, skipped)
    return kept


def _packs_of_damaged(
    file: Path, manifest: Manifest, order: Tensor, sizes: Tensor
) -> dict[int, Columns]:
    """The packs of a damaged scores.safetensors whose checksum agrees."""
    try:
        tensors = tensors_at(file.read_bytes(), manifest.get("layout") or layout_of(file))
    except (StoreError, OSError):
        return {}
    kept = tensors.pop("pack_checksum", torch.empty(0))
    offsets, losses = tensors.pop("token_offset", None), tensors.get("token_loss")
    samples = tensors.keys() - {"token_loss"}
    if kept.shape != sizes.shape or not {"loss", "count"} <= samples:
        return {}
    if any(tensors[name].shape != order.shape for name in samples):
        return {}
    if losses is None:
        columns = reorder(tensors, order)
    elif offsets is None or offsets.shape != (len(order) + 1,):
        return {}
    else:  # a sample whose place can't be trusted gets no targets, and so another checksum
        starts, counts = offsets[:-1], tensors["count"]
        placed = (starts >= 0) & (counts >= 0) & (starts + counts == offsets[1:])
        placed &= offsets[1:] <= len(losses)
        tensors["count"] = counts.where(placed, 0)
        tensors["token_loss"] = losses[places(starts, tensors["count"])]
        columns = reorder(tensors, order)
    agree = kept == checksums(columns, sizes, store_digest(manifest))
    packs = split(columns, sizes)
    return {index: packs[index] for index in agree.nonzero().flatten().tolist()}


def _manifest_of(scores: Scores) -> Manifest:
    given = {name: scores.metadata.get(name, {}) for name in FIELDS}
    return make_manifest(**given)


def _tensors_of(scores: Scores) -> Columns:
    tensors = {**scores.columns, "loss": scores.losses, "count": scores.counts}
    if scores.flat_token_losses is not None:
        tensors["token_loss"] = scores.flat_token_losses
        tensors["token_offset"] = torch.cat([torch.zeros(1).long(), scores.counts.cumsum(0)])
    return tensors
