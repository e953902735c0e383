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

import hashlib
import json
import logging
import uuid
from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any

import torch
from torch import Tensor

import flowdata
from flowdata.files import replacing
from flowdata.locks import lock
from flowdata.packs import Columns, checksums, join, octets, places, reorder, split
from flowdata.scores import ScoreMismatchError, Scores

FORMAT = 2
SCORES, MANIFEST, PARTS, LOCK = "scores.safetensors", "manifest.json", "parts", ".lock"
_FIELDS = ("identity", "plan", "details", "skipped")  # objects, all of them
_OWN = {"loss", "count", "token_loss", "token_offset", "pack_checksum"}  # others: further columns
_DTYPES = {"F32": torch.float32, "I64": torch.int64}
_SECONDS, _SHARE = 10.0, 0.01  # a crash loses at most so long, or so much of the time so far
logger = logging.getLogger("flowdata")

Manifest = dict[str, Any]


class StoreError(ValueError):
    """A folder or file that is no store, is unfinished, damaged or of another format."""


@dataclass(frozen=True)
class Kept:
    """Packs that are done, by number, and why samples of them were skipped, by index."""

    packs: dict[int, Columns] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def add(self, packs: Mapping[int, Columns], skipped: Mapping[int, str]) -> None:
        """Take packs that are not there yet."""
        self.packs.update({pack: packs[pack] for pack in packs.keys() - self.packs.keys()})
        self.skipped.update(skipped)


def make_manifest(
    identity: Mapping[str, Any],
    plan: Mapping[str, Any],
    details: Mapping[str, Any],
    skipped: Mapping[int, str] | None = None,
) -> Manifest:
    """Return the manifest of a store, as it will be read back.

    Raises:
        TypeError: `details` holds what JSON can't.
    """
    manifest = {
        "format": FORMAT,
        "flowdata": flowdata.__version__,
        "identity": dict(identity),
        "plan": dict(plan),
        "details": dict(details),
        "skipped": {str(index): reason for index, reason in (skipped or {}).items()},
    }
    try:
        as_read: Manifest = json.loads(json.dumps(manifest))
    except TypeError as error:
        raise TypeError(f"details must be JSON-like (strings, numbers, lists): {error}") from None
    return as_read


def check_identity(
    kept: Mapping[str, Any],
    wanted: Mapping[str, Any],
    what: str,
    remedy: str = "Score into another folder, or delete this one if its losses are unwanted",
) -> None:
    """Raise ScoreMismatchError with what differs unless both identities are the same."""
    names = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(
            f"{name}: {what} has {_short(kept.get(name))}, this run {_short(wanted.get(name))}"
            for name in names
        )
        raise ScoreMismatchError(
            f"{what} was made with another {' and '.join(names)} ({differing}). {remedy}"
        )


# --- whole folders ---------------------------------------------------------------------------


def read_manifest(folder: Path) -> Manifest | None:
    """Return the manifest of a store, None for a folder that is empty or not there yet.

    Raises:
        StoreError: the folder holds other things, or no manifest in it can be read.
    """
    check_folder(folder)
    problem: StoreError | None = None
    for file in (folder / MANIFEST, folder / SCORES, *_parts(folder)):
        try:
            return _manifest_in(file)
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
    if folder.exists() and not folder.is_dir():
        raise StoreError(f"{folder} is a file; a store is a folder: pass another path")
    if (folder / PARTS).is_symlink():
        raise StoreError(f"{folder / PARTS} is a link: a store keeps its parts in itself")
    names = sorted(path.name for path in folder.iterdir()) if folder.exists() else []
    foreign = [name for name in names if not name.startswith((LOCK, f".{SCORES}", f".{MANIFEST}"))]
    if foreign and not {SCORES, MANIFEST}.intersection(foreign) and not _parts(folder):
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
    """Write scores as a finished store, or as one file if `path` ends in `.safetensors`."""
    if path.suffix == ".safetensors":
        write_file(path, _tensors_of(scores), _manifest_of(scores))
    else:
        check_folder(path)
        write_file(path / SCORES, _tensors_of(scores), _manifest_of(scores))
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
    write_manifest(folder, {**manifest, "layout": _layout(folder / SCORES)})
    for part in _parts(folder):
        part.unlink()
    with suppress(OSError):  # it isn't there, or somebody's files are in it
        (folder / PARTS).rmdir()


def repair_manifest(folder: Path) -> None:
    """Write manifest.json anew from a whole scores.safetensors, should it be missing or damaged."""
    try:
        _manifest_in(folder / MANIFEST)
    except (StoreError, OSError):
        file = folder / SCORES
        write_manifest(folder, {**_manifest_in(file), "layout": _layout(file)})


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
        str(file.relative_to(folder)): _state(file, folder) for file in [*files, *_parts(folder)]
    }
    if not (folder / SCORES).exists():
        findings[SCORES] = "not there yet: scoring is not finished" if findings else "not there"
    return findings


def _state(file: Path, folder: Path) -> str:
    try:
        if file.name == MANIFEST:
            _manifest_in(file)
        elif file.name == SCORES:
            load_scores(file)
        else:
            manifest = read_file(file)[1]
            if store_digest(manifest) != store_digest(read_manifest(folder) or manifest):
                return f"{file} belongs to another store"
    except (StoreError, OSError) as error:
        return str(error)
    return "whole"


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


# --- parts -----------------------------------------------------------------------------------


class PartWriter:
    """Collects packs and writes them as parts; a context, at whose end the rest is written.

    A crash loses at most 10 seconds, or a hundredth of the time so far.

    Args:
        folder: the store.
        manifest: its manifest, already written.
    """

    def __init__(self, folder: Path, manifest: Manifest) -> None:
        self.parts = folder / PARTS
        self.parts.mkdir(exist_ok=True)
        self.manifest = manifest
        self.begun = self.written = monotonic()
        self.waiting: dict[int, Columns] = {}
        self.skipped: dict[str, str] = {}

    def add(self, pack: int, columns: Columns, skipped: Mapping[int, str]) -> None:
        """Take one pack's columns, and why samples of it were skipped."""
        self.waiting[pack] = columns
        self.skipped.update({str(index): reason for index, reason in skipped.items()})
        now = monotonic()
        if now - self.written >= max(_SECONDS, _SHARE * (now - self.begun)):
            self.flush()

    def flush(self) -> None:
        """Write what has been collected."""
        self.written = monotonic()
        if self.waiting:
            tensors = {**join(list(self.waiting.values())), "pack": torch.tensor([*self.waiting])}
            manifest = {**self.manifest, "skipped": self.skipped}
            manifest.pop("layout", None)
            write_file(self.parts / f"{uuid.uuid4().hex}.safetensors", tensors, manifest)
            self.waiting, self.skipped = {}, {}

    def __enter__(self) -> PartWriter:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        try:
            self.flush()
        except OSError as second:
            if error is None:
                raise
            logger.warning("the last %d packs could not be kept: %s", len(self.waiting), second)


def read_kept(folder: Path, manifest: Manifest, order: Tensor, sizes: Tensor) -> Kept:
    """Return every pack that earlier runs finished and that can be trusted.

    Args:
        folder: the store.
        manifest: its manifest.
        order: (N,) int64, the plan's.
        sizes: (packs,) int64, the plan's samples in each pack.
    """
    kept = Kept()
    for file in _parts(folder):
        try:
            kept.add(*_packs_of_part(file, store_digest(manifest), sizes))
        except (StoreError, OSError) as error:
            logger.warning("%s; what it held is scored again", error)
    if (folder / SCORES).exists():
        skipped = {int(index): reason for index, reason in manifest["skipped"].items()}
        salvaged = _packs_of_damaged(folder / SCORES, manifest, order, sizes)
        logger.warning("%d of %d packs of %s are whole", len(salvaged), len(sizes), folder / SCORES)
        kept.add(salvaged, skipped)
    return kept


def _packs_of_part(
    file: Path, store: str, sizes: Tensor
) -> tuple[dict[int, Columns], dict[int, str]]:
    tensors, manifest = read_file(file)
    if store_digest(manifest) != store:
        raise StoreError(f"{file} belongs to another store")
    if not {"pack", "loss", "count"} <= tensors.keys():
        raise StoreError(f"{file} is not a part: it lacks one of pack, loss and count")
    packs = tensors.pop("pack")
    if packs.dim() != 1 or packs.dtype != torch.int64 or len(packs) == 0:
        raise StoreError(f"{file} names no packs")
    if not (packs.min() >= 0 and packs.max() < len(sizes)):
        raise StoreError(f"{file} names packs that the plan does not have")
    sizes = sizes[packs]
    targets = int(tensors["count"].sum())
    for name, values in tensors.items():
        wanted = torch.int64 if name == "count" else torch.float32
        length = targets if name == "token_loss" else int(sizes.sum())
        if values.shape != (length,) or values.dtype != wanted:
            raise StoreError(f"{file} does not hold one {name} for every sample of its packs")
    if (tensors["count"] < 0).any():
        raise StoreError(f"{file} holds negative counts")
    skipped = {int(index): reason for index, reason in manifest["skipped"].items()}
    return dict(zip(packs.tolist(), split(tensors, sizes), strict=True)), skipped


def _packs_of_damaged(
    file: Path, manifest: Manifest, order: Tensor, sizes: Tensor
) -> dict[int, Columns]:
    """The packs of a damaged scores.safetensors whose checksum agrees."""
    try:
        tensors = _tensors_at(file.read_bytes(), manifest.get("layout") or _layout(file))
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


# --- files -----------------------------------------------------------------------------------


def write_manifest(folder: Path, manifest: Manifest) -> None:
    """Write manifest.json."""
    with replacing(folder / MANIFEST) as file:
        file.write(json.dumps(_signed(manifest), indent=1, sort_keys=True).encode())


def store_digest(manifest: Manifest) -> str:
    """Return the digest that says which files belong together."""
    tied = {name: manifest[name] for name in ("format", "identity", "plan")}
    return hashlib.sha256(_canonical(tied)).hexdigest()


def _parts(folder: Path) -> list[Path]:
    return [file for file in sorted((folder / PARTS).glob("[!.]*.safetensors")) if file.is_file()]


def _manifest_of(scores: Scores) -> Manifest:
    given = {name: scores.metadata.get(name, {}) for name in _FIELDS}
    return make_manifest(**given)


def _tensors_of(scores: Scores) -> Columns:
    tensors = {**scores.columns, "loss": scores.losses, "count": scores.counts}
    if scores.flat_token_losses is not None:
        tensors["token_loss"] = scores.flat_token_losses
        tensors["token_offset"] = torch.cat([torch.zeros(1).long(), scores.counts.cumsum(0)])
    return tensors


def write_file(path: Path, tensors: Columns, manifest: Manifest) -> None:
    """Write tensors and manifest as one safetensors file, checksummed, whole or not at all."""
    from safetensors.torch import save

    tensors = {name: tensor.contiguous() for name, tensor in tensors.items()}
    with replacing(path) as file:
        file.write(save(tensors, {"flowdata": _metadata(tensors, manifest)}))


def _metadata(tensors: Columns, manifest: Manifest) -> str:
    signed = _signed(manifest)
    return _canonical({"manifest": signed, "content": _content(tensors, signed)}).decode()


def read_file(path: Path) -> tuple[Columns, Manifest]:
    """Return a file's tensors and manifest, both proven by checksums.

    Raises:
        StoreError: it is damaged, of another format, or not written by `write_file`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(str(path), framework="pt") as file:
            text = (file.metadata() or {}).get("flowdata", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged or no safetensors file ({error})") from None
    manifest, content = _parse_metadata(text, path)
    if content != _content(tensors, _signed(manifest)):
        raise StoreError(f"{path} is damaged: its checksum does not agree with its content")
    return tensors, manifest


def _parse_metadata(text: str, path: Path) -> tuple[Manifest, Any]:
    """The manifest in a safetensors file's header, proven, and the checksum of the whole."""
    metadata = _parse_json(text, path)
    if not isinstance(metadata, dict) or "manifest" not in metadata:
        older = isinstance(metadata, dict) and "format" in metadata  # format 1 had it flat
        return _proven(metadata if older else None, path), None
    return _proven(metadata["manifest"], path), metadata.get("content")


def _parse_json(text: str | bytes, path: Path) -> Any:
    if not text:
        raise StoreError(f"{path} was not written by flowdata, or is damaged: it holds no manifest")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}") from None


def _proven(parsed: Any, path: Path) -> Manifest:
    """A signed manifest without its checksum, which is proven."""
    if not isinstance(parsed, dict) or "format" not in parsed:
        raise StoreError(f"{path} is damaged: it should hold an object with a 'format'")
    if parsed["format"] != FORMAT:
        raise StoreError(
            f"{path} has format {_short(parsed['format'])}, this version of flowdata "
            f"({flowdata.__version__}) reads format {FORMAT}; use the version that wrote it"
        )
    if parsed.pop("checksum", None) != _signed(parsed)["checksum"]:
        raise StoreError(f"{path} is damaged: its checksum does not agree with its content")
    for name in _FIELDS:
        if not isinstance(parsed.get(name), dict):
            raise StoreError(f"{path} is damaged: its field {name!r} should be an object")
    if not all(index.isdecimal() and len(index) < 20 for index in parsed["skipped"]):
        raise StoreError(f"{path} is damaged: its field 'skipped' should name indices")
    return parsed


def _signed(manifest: Manifest) -> Manifest:
    return {**manifest, "checksum": hashlib.sha256(_canonical(manifest)).hexdigest()}


def _content(tensors: Mapping[str, Tensor], signed: Manifest) -> str:
    digest = hashlib.sha256(_canonical(signed))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(octets(tensor))
    return digest.hexdigest()


def _manifest_in(file: Path) -> Manifest:
    """The manifest in manifest.json or in a safetensors file's header, itself proven."""
    if file.name == MANIFEST:
        return _proven(_parse_json(file.read_bytes(), file), file)
    return _parse_metadata(str(_header(file)[1].get("__metadata__", {}).get("flowdata", "")), file)[
        0
    ]


def _layout(file: Path) -> dict[str, list[Any]]:
    """Where the tensors of a safetensors file lie: dtype, first byte and end of each."""
    begin, header = _header(file)
    try:
        return {
            name: [entry["dtype"], *(begin + place for place in entry["data_offsets"])]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged: its header tells of no tensors") from error


def _header(path: Path) -> tuple[int, dict[str, Any]]:
    """Where a safetensors file's tensors begin, and what its header says."""
    with path.open("rb") as file:
        length = min(int.from_bytes(file.read(8), "little"), path.stat().st_size)
        content = file.read(length)
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: its header is {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise StoreError(f"{path} is damaged: its header should be an object")
    return 8 + length, header


def _tensors_at(content: bytes, layout: Mapping[str, Any]) -> Columns:
    """The one-dimensional tensors at such places; zeros stand in for what a file lacks."""
    tensors: Columns = {}
    try:
        for name, (dtype, first, end) in layout.items():
            if not 0 <= first <= end <= 2 * len(content) + 2**20:
                raise ValueError(f"tensor {name!r} can't lie in bytes {first} to {end}")
            values = bytearray(content[first:end].ljust(end - first, b"\0"))
            kind = _DTYPES[dtype]
            tensors[name] = torch.frombuffer(values, dtype=kind) if values else torch.empty(0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"no tensors where they should be: {error}") from None
    return tensors


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()


def _short(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 60 else text[:44] + "…"
