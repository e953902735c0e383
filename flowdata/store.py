"""The store: a folder that keeps losses while they are made and once they are complete.

    scores/
        scores.safetensors    once complete: all that a reader needs
        manifest.json         what the scores are of; written before the first part
        parts/*.safetensors   while scoring: what is done so far, removed at the end
        .lock                 held by the one process that scores

**scores.safetensors** is a plain safetensors file, readable without this library:

    loss          float32 (N,)    each sample's mean loss over its targets; NaN: it has none
    count         int64 (N,)      its number of targets
    token_loss    float32 (Σcount,)   optional: the targets' losses, sample after sample
    token_offset  int64 (N+1,)    with token_loss: where each sample's targets begin
    any other     float32 (N,)    a further column, such as entropy or gradient_norm

**A part** holds whole packs of the plan, one after another, samples in the plan's order:

    pack          int64 (K,)      which packs
    loss, count   as above, for the packs' samples; token_loss and further columns optional

**Metadata.** Both kinds carry one string, `flowdata`, in the safetensors header: canonical JSON
(sorted keys, no spaces) with `checksum`, the hex SHA-256 over the canonical JSON without it,
then, for each tensor in name order, `name|dtype|shape` in torch's words and the tensor's
little-endian bytes. In `scores.safetensors` the JSON is the manifest, in a part
`{"format": …, "store": <store digest>}`.

**manifest.json**, fields:

    format     1; other versions are refused
    flowdata   the version that wrote it
    identity   what must agree for losses to be reused: model, dataset, loss, dtype, …
    plan       how the data set is cut into packs: max_tokens, batch_size, packs, digest
    details    anything a reader may want to know (the data file, the method chosen, …)

The *store digest*, SHA-256 over format, identity and plan, ties parts to their manifest. Every
file is written under another name, synced and renamed, so a reader sees all of it or nothing. A
part that is torn, truncated, changed, duplicated or foreign is left out, with a warning, and
only its packs are scored again.
"""

from __future__ import annotations

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import flowdata
from flowdata.files import replacing
from flowdata.scores import ScoreMismatchError, Scores

FORMAT = 1
_OWN = {"loss", "count", "token_loss", "token_offset"}  # every other tensor is a further column
SCORES, MANIFEST, PARTS, LOCK = "scores.safetensors", "manifest.json", "parts", ".lock"
logger = logging.getLogger("flowdata")

Manifest = dict[str, Any]


class StoreError(ValueError):
    """A folder or file that is no store, is unfinished, damaged or of another format."""


def make_manifest(
    identity: Mapping[str, Any], plan: Mapping[str, Any], details: Mapping[str, Any]
) -> Manifest:
    """Return the manifest of a new store."""
    return {
        "format": FORMAT,
        "flowdata": flowdata.__version__,
        "identity": dict(identity),
        "plan": dict(plan),
        "details": dict(details),
    }


def check_identity(kept: Mapping[str, Any], wanted: Mapping[str, Any], path: Path) -> None:
    """Raise ScoreMismatchError with what differs unless both identities are the same."""
    names = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(
            f"{name}: the store has {_short(kept.get(name))}, this run {_short(wanted.get(name))}"
            for name in names
        )
        raise ScoreMismatchError(
            f"the store {path} was made with another {' and '.join(names)} ({differing}). "
            "Score into another folder, or delete this one if its losses are no longer wanted"
        )


# --- whole folders ---------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a store, None for a folder that is empty or not there yet.

    Raises:
        StoreError: the folder holds other things, or a manifest that can't be read.
    """
    if (folder / SCORES).exists():
        return _as_manifest(_read(folder / SCORES)[1], folder / SCORES)
    if (folder / MANIFEST).exists():
        content = (folder / MANIFEST).read_bytes()
        return _as_manifest(_parse(content, folder / MANIFEST), folder / MANIFEST)
    check_folder(folder)
    return None


def check_folder(folder: Path) -> None:
    """Raise StoreError unless a store is at `folder`, or could be begun there."""
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; a store is a folder: pass another path")
    if (folder / SCORES).exists() or (folder / MANIFEST).exists():
        return
    foreign = sorted(p.name for p in folder.iterdir() if p.name != LOCK) if folder.exists() else []
    if foreign:
        raise StoreError(
            f"{folder} is not a flowdata store: it has no {MANIFEST}, but holds {foreign[0]}"
            f"{' and more' if len(foreign) > 1 else ''}; pass an empty or a new folder"
        )


def is_finished(folder: Path) -> bool:
    """Return whether the complete scores are there."""
    return (folder / SCORES).exists()


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
    tensors, metadata = _read(file)
    if not {"loss", "count"} <= set(tensors):
        raise StoreError(f"{file} holds no 'loss' and 'count': it is not a file of scores")
    return Scores(
        tensors["loss"],
        tensors["count"],
        metadata=_as_manifest(metadata, file),
        token_losses=tensors.get("token_loss"),
        columns={name: tensors[name] for name in set(tensors) - _OWN},
    )


def save_scores(scores: Scores, path: Path) -> Path:
    """Write scores as a finished store, or as one file if `path` ends in `.safetensors`."""
    file = path if path.suffix == ".safetensors" else path / SCORES
    if file.parent == path:
        read_manifest(path)  # refuses a folder of other things
    metadata = scores.metadata
    manifest = make_manifest(
        metadata.get("identity", {}), metadata.get("plan", {}), metadata.get("details", {})
    )
    tensors = {**scores.columns, "loss": scores.losses, "count": scores.counts}
    if scores.flat_token_losses is not None:
        tensors["token_loss"] = scores.flat_token_losses
        tensors["token_offset"] = torch.cat([torch.zeros(1).long(), scores.counts.cumsum(0)])
    _write(file, tensors, manifest)
    return path


def finish(folder: Path, scores: Scores) -> None:
    """Write the complete scores, then remove the parts they were merged from."""
    save_scores(scores, folder)
    for part in (folder / PARTS).glob("*"):
        part.unlink()
    if (folder / PARTS).exists():
        (folder / PARTS).rmdir()


def verify_store(folder: Path) -> dict[str, str]:
    """Return, for each file of a store, "whole" or what is wrong with it.

    Raises:
        FileNotFoundError: there is no folder.
        StoreError: it is not a store.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no store at {folder}")
    findings: dict[str, str] = {}
    complete = folder / SCORES
    for file in (complete,) if complete.exists() else sorted((folder / PARTS).glob("*")):
        findings[str(file.relative_to(folder))] = _state(file)
    if not complete.exists():
        manifest = read_manifest(folder)
        findings[SCORES] = "not there yet: scoring is not finished" if manifest else "not there"
    return findings


def _state(file: Path) -> str:
    try:
        _read(file)
    except (StoreError, OSError) as error:
        return str(error)
    return "whole"


@contextmanager
def locked(folder: Path) -> Iterator[None]:
    """Hold the store's lock for a block; wait, and say so, while another process has it."""
    from filelock import FileLock, Timeout

    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    lock = FileLock(str(folder / LOCK))
    try:
        lock.acquire(timeout=0)
    except Timeout:
        logger.warning("another process is scoring into %s; waiting for it to end", folder)
        lock.acquire()
    try:
        yield
    finally:
        lock.release()


# --- parts -----------------------------------------------------------------------------------


class PartWriter:
    """Collects packs and writes them as parts: a crash loses what one part would hold.

    Args:
        folder: the store.
        manifest: its manifest, already written.
        packs_per_part: how many packs are collected before a part is written.
    """

    def __init__(self, folder: Path, manifest: Manifest, packs_per_part: int) -> None:
        self.parts = folder / PARTS
        self.parts.mkdir(exist_ok=True)
        self.metadata = {"format": FORMAT, "store": store_digest(manifest)}
        self.packs_per_part = packs_per_part
        self.waiting: dict[int, dict[str, Tensor]] = {}

    def add(self, pack: int, columns: dict[str, Tensor]) -> None:
        """Take one pack's columns (`loss`, `count`, maybe `token_loss`)."""
        self.waiting[pack] = columns
        if len(self.waiting) >= self.packs_per_part:
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        if self.waiting:
            columns = list(self.waiting.values())
            tensors = {name: torch.cat([c[name] for c in columns]) for name in columns[0]}
            tensors["pack"] = torch.tensor(list(self.waiting))
            _write(self.parts / f"{uuid.uuid4().hex}.safetensors", tensors, self.metadata)
            self.waiting = {}


def read_parts(
    folder: Path, manifest: Manifest, pack_sizes: Tensor
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    """Yield every pack that an earlier run finished, with its columns.

    A part that can't be trusted is left out with a warning; so is a pack seen before.

    Args:
        folder: the store.
        manifest: its manifest.
        pack_sizes: (number of packs,) int64, samples in each pack of the plan.
    """
    seen: set[int] = set()
    store = store_digest(manifest)
    for file in sorted((folder / PARTS).glob("*.safetensors")):
        try:
            tensors, metadata = _read(file)
            if metadata.get("store") != store:
                raise StoreError(f"{file} belongs to another store")
            packs = list(_split_packs(tensors, pack_sizes, file))
        except (StoreError, OSError) as error:
            logger.warning("%s; what it held is scored again", error)
            continue
        for pack, columns in packs:
            if pack not in seen:
                seen.add(pack)
                yield pack, columns


def _split_packs(
    tensors: dict[str, Tensor], pack_sizes: Tensor, file: Path
) -> Iterator[tuple[int, dict[str, Tensor]]]:
    if not {"pack", "loss", "count"} <= set(tensors):
        raise StoreError(f"{file} is not a part: it lacks one of pack, loss and count")
    packs = tensors.pop("pack")
    if len(packs) and not (packs.min() >= 0 and packs.max() < len(pack_sizes)):
        raise StoreError(f"{file} names packs that the plan does not have")
    sizes = pack_sizes[packs]
    if not len(tensors["loss"]) == len(tensors["count"]) == int(sizes.sum()):
        raise StoreError(f"{file} does not hold one loss and count for every sample of its packs")
    counts = tensors["count"].split(sizes.tolist())
    targets = [int(part.sum()) for part in counts]
    split = {
        name: values.split(targets if name == "token_loss" else sizes.tolist())
        for name, values in tensors.items()
    }
    for position, pack in enumerate(packs.tolist()):
        yield pack, {name: parts[position] for name, parts in split.items()}


# --- files -----------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(manifest, indent=1, sort_keys=True).encode())


def store_digest(manifest: Manifest) -> str:
    """Return the digest that ties parts to their manifest."""
    tied = {name: manifest[name] for name in ("format", "identity", "plan")}
    return hashlib.sha256(_canonical(tied)).hexdigest()


def _write(path: Path, tensors: dict[str, Tensor], metadata: Mapping[str, Any]) -> None:
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    signed = {**metadata, "checksum": _checksum(tensors, metadata)}
    with replacing(path) as file:
        file.write(save(tensors, metadata={"flowdata": _canonical(signed).decode()}))


def _read(path: Path) -> tuple[dict[str, Tensor], dict[str, Any]]:
    """Return a file's tensors and metadata, both proven by the checksum."""
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("flowdata")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError) as error:
        raise StoreError(f"{path} is damaged or no safetensors file ({error})") from None
    if text is None:
        raise StoreError(f"{path} was not written by flowdata: its header names no 'flowdata'")
    metadata = _parse(text.encode(), path)
    if metadata.pop("checksum", None) != _checksum(tensors, metadata):
        raise StoreError(f"{path} is damaged: its checksum does not agree with its content")
    return tensors, metadata


def _parse(content: bytes, path: Path) -> dict[str, Any]:
    """Return a JSON object that names this format."""
    try:
        parsed = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}") from None
    if not isinstance(parsed, dict) or "format" not in parsed:
        raise StoreError(f"{path} is damaged: it should hold an object with a 'format'")
    if parsed["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {parsed['format']!r}, this version of flowdata "
            f"({flowdata.__version__}) reads format {FORMAT}; use the version that wrote it"
        )
    return parsed


def _as_manifest(parsed: dict[str, Any], path: Path) -> Manifest:
    """Return a JSON object that has a manifest's fields."""
    for field in ("identity", "plan", "details"):
        if not isinstance(parsed.get(field), dict):
            raise StoreError(f"{path} is damaged: its field {field!r} should be an object")
    return parsed


def _checksum(tensors: Mapping[str, Tensor], metadata: Mapping[str, Any]) -> str:
    digest = hashlib.sha256(_canonical(metadata))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        if tensor.numel():
            digest.update(tensor.reshape(-1).view(torch.uint8).numpy().data)
    return digest.hexdigest()


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:44] + "…"
