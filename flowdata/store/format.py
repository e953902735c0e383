"""The format of a store: a folder that keeps losses while they are made and once complete.

    scores/
        scores.safetensors    once complete: all that a reader needs
        manifest.json         what the scores are of; written before the first part
        parts/*.safetensors   while scoring: the packs finished so far, removed at the end
        .lock                 while scoring: the process that scores

**scores.safetensors** is a plain safetensors file, readable without this library:

    loss            float32 (N,)    each sample's mean loss over its targets, nats; NaN: none
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
    identity   what must agree for losses to be reused: model, dataset, loss, dtype, … (identity.py)
    plan       how the data set is cut into packs: max_tokens, batch_size, packs, digest, …; and
               how each is run: threads, compile, attention_by_products: last bits depend on both
    details    anything a reader may want to know (the data file, …)
    skipped    {"index": reason} of samples that could not be read; in a part, of its samples
    checked    in a complete store alone: {"samples": how many were compared with the model run on
               them alone, "largest_difference": of their losses, "num_classes": classes, or
               tokens, that their logits told apart, 0 or absent where that is not known}
    suspects   in manifest.json while scoring: samples that some way gave a wrong loss; is_wrong:
               the parts were made by it
    layout     in manifest.json of a complete store alone: {tensor: [dtype, first byte, end]} of
               scores.safetensors, bytes counted from the file's beginning

**Where.** A store is a folder, or a URL on object storage: ``s3://bucket/scores``, ``gs://…``,
``hf://buckets/owner/name/…`` (places.py). The objects are the files above, by the same names and
with the same bytes, so that copying them makes one of the other. Parts are put there as they are
done, each whole, which lets ranks on machines without a shared folder share a job; the lock is an
object too (lock.py). A repository of the Hub, ``hf://owner/name``, where each write is a commit,
takes finished scores alone.

**What survives what.** The *store digest*, SHA-256 over format, identity and plan, says what
belongs together. Every file is written under another name, synced and renamed, or put as one
object, so a reader sees all of it or nothing. A part that is torn, truncated, changed, duplicated
or foreign is left out, with a warning, and only its packs are scored again. A lost manifest.json is
taken from any whole file. Of a damaged scores.safetensors those packs are kept whose
`pack_checksum` agrees: the first 8 bytes, little-endian, of BLAKE2b keyed with the store digest
over the pack's number (8 bytes, little-endian) and the bytes of its samples' values, column by
column in name order. The plan says which samples a pack has. Files are data: nothing in them is
run, no name in them is a path.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Mapping
from typing import Any, TypedDict, cast

import torch
from torch import Tensor

from flowdata._common.excerpts import excerpt_of
from flowdata._common.safetensors_file import header_of, octets
from flowdata._version import __version__
from flowdata.errors import StoreError
from flowdata.store.packs import Columns
from flowdata.store.places import Place, beginning_of, local_copy, write_whole

FORMAT, MANIFEST = 2, "manifest.json"
FIELDS = ("identity", "plan", "details", "skipped")  # the manifest's fields that are objects
STORE_TENSORS = {"loss", "count", "token_loss", "token_offset", "pack_checksum"}
_DTYPES = {"F32": torch.float32, "I64": torch.int64}  # those of a store, in safetensors' words
_MOST_DIGITS = 19  # of an index: those of 2^63


class OldFormatError(StoreError):
    """A store of an earlier format, whose losses have to be made anew."""


class _ManifestFields(TypedDict):
    format: int
    flowdata: str
    identity: dict[str, Any]
    plan: dict[str, Any]
    details: dict[str, Any]
    skipped: dict[str, str]


class Manifest(_ManifestFields, total=False):
    """What a store is of; the fields are explained at the top of this file.

    `layout` is in the manifest.json of a finished store alone, `checked` in finished stores,
    `suspects` and `is_wrong` in the manifest.json of one that is not finished.
    """

    layout: dict[str, list[Any]]
    checked: dict[str, Any]
    suspects: list[int]
    is_wrong: bool


def make_manifest(
    identity: Mapping[str, Any],
    plan: Mapping[str, Any],
    details: Mapping[str, Any],
    skipped: Mapping[int, str] | None = None,
    checked: Mapping[str, Any] | None = None,
) -> Manifest:
    """Return the manifest of a store, as it will be read back.

    It has gone through JSON, so that tuples are lists already and a comparison with a manifest
    that was read does not fail for that.

    Args:
        identity: what must agree for losses to be reused.
        plan: how the data set is cut into packs; empty where there are none.
        details: JSON-like notes for readers.
        skipped: why samples could not be read, by index.
        checked: how many samples were compared with the truth, the largest difference, and the
            number of classes.

    Raises:
        TypeError: `details` holds what JSON can't.
    """
    manifest = {
        "format": FORMAT,
        "flowdata": __version__,
        "identity": dict(identity),
        "plan": dict(plan),
        "details": dict(details),
        "skipped": {str(index): reason for index, reason in (skipped or {}).items()},
    }
    if checked:
        manifest["checked"] = dict(checked)
    try:
        as_read: Manifest = json.loads(json.dumps(manifest))
    except TypeError as error:
        raise TypeError(f"details must be JSON-like (strings, numbers, lists): {error}") from None
    return as_read


def skipped_in(manifest: Manifest) -> dict[int, str]:
    """Return why samples could not be read, by index; the keys of JSON are strings."""
    return {int(index): reason for index, reason in manifest["skipped"].items()}


def write_manifest(folder: Place, manifest: Manifest) -> None:
    """Write manifest.json, whole or not at all."""
    content = json.dumps(_signed(manifest), indent=1, sort_keys=True).encode()
    write_whole(folder / MANIFEST, content)


def store_digest(manifest: Manifest) -> str:
    """Return the digest that says which files belong together."""
    fields = {name: manifest[name] for name in ("format", "identity", "plan")}
    return hashlib.sha256(_canonical(fields)).hexdigest()


def write_file(path: Place, tensors: Columns, manifest: Manifest) -> None:
    """Write tensors and manifest as one safetensors file, checksummed, whole or not at all."""
    # The widest come first, so that each lies at a multiple of its width, as readers map it.
    names = sorted(tensors, key=lambda name: (-tensors[name].itemsize, name))
    tensors = {name: tensors[name].contiguous() for name in names}
    header = header_of(tensors, {"flowdata": _metadata(tensors, manifest)})
    write_whole(path, header, *map(octets, tensors.values()))


def _metadata(tensors: Columns, manifest: Manifest) -> str:
    signed = _signed(manifest)
    return _canonical({"manifest": signed, "content": _content(tensors, signed)}).decode()


def read_file(path: Place) -> tuple[Columns, Manifest]:
    """Return a file's tensors and manifest, both verified by checksums.

    Raises:
        StoreError: it is damaged, of another format, or not written by `write_file`.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with local_copy(path) as copy, safe_open(str(copy), framework="pt") as file:
            text = (file.metadata() or {}).get("flowdata", "")
            tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
    except (SafetensorError, UnicodeDecodeError, ValueError, KeyError, RuntimeError) as error:
        raise StoreError(f"{path} is damaged or no safetensors file ({error})") from None
    manifest, content = _parse_metadata(text, path)
    if content != _content(tensors, _signed(manifest)):
        raise StoreError(f"{path} is damaged: its checksum does not agree with its content")
    return tensors, manifest


def _parse_metadata(text: str, path: Place) -> tuple[Manifest, Any]:
    """The manifest in a safetensors file's header, verified, and the checksum of the file."""
    metadata = _parse_json(text, path)
    if isinstance(metadata, dict) and "manifest" in metadata:
        return _verify(metadata["manifest"], path), metadata.get("content")
    # Format 1 had the manifest's fields here, without a `manifest` around them. Verifying them
    # says that the format is too old, where anything else is damaged.
    is_format_1 = isinstance(metadata, dict) and "format" in metadata
    return _verify(metadata if is_format_1 else None, path), None


def _parse_json(text: str | bytes, path: Place) -> Any:
    if not text:
        raise StoreError(f"{path} was not written by flowdata, or is damaged: it holds no manifest")
    try:
        return json.loads(text)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: {error}") from None


def _verify(parsed: Any, path: Place) -> Manifest:
    """A signed manifest without its checksum, once that and the fields' types are verified."""
    if not isinstance(parsed, dict) or "format" not in parsed:
        raise StoreError(f"{path} is damaged: it should hold an object with a 'format'")
    if parsed["format"] != FORMAT:
        formats = (
            f"{path} has format {excerpt_of(parsed, 'format')}, this version of flowdata "
            f"({__version__}) reads format {FORMAT}"
        )
        if parsed["format"] in range(1, FORMAT):
            raise OldFormatError(
                f"{formats}; score into another folder, or delete this one if its losses are "
                "unwanted"
            )
        raise StoreError(f"{formats}; upgrade flowdata")
    if parsed.pop("checksum", None) != _signed(parsed)["checksum"]:
        raise StoreError(f"{path} is damaged: its checksum does not agree with its content")
    for name in FIELDS:
        if not isinstance(parsed.get(name), dict):
            raise StoreError(f"{path} is damaged: its field {name!r} should be an object")
    if not all(index.isdecimal() and len(index) <= _MOST_DIGITS for index in parsed["skipped"]):
        raise StoreError(f"{path} is damaged: its field 'skipped' should name indices")
    return cast(Manifest, parsed)


def _signed(manifest: Mapping[str, Any]) -> dict[str, Any]:
    """A manifest with the checksum of its other fields."""
    return {**manifest, "checksum": hashlib.sha256(_canonical(manifest)).hexdigest()}


def _content(tensors: Mapping[str, Tensor], signed: Mapping[str, Any]) -> str:
    """The checksum of a file: over its signed manifest and its tensors."""
    digest = hashlib.sha256(_canonical(signed))
    for name, tensor in sorted(tensors.items()):
        digest.update(f"{name}|{tensor.dtype}|{list(tensor.shape)}".encode())
        digest.update(octets(tensor))
    return digest.hexdigest()


def manifest_in(file: Place) -> Manifest:
    """Return the manifest in manifest.json or in a safetensors file's header.

    The manifest is verified, the tensors beside it are not read.

    Raises:
        StoreError: the manifest is damaged, of another format, or not there.
    """
    if file.name == MANIFEST:
        return _verify(_parse_json(file.read_bytes(), file), file)
    metadata = _header(file)[1].get("__metadata__", {})
    return _parse_metadata(str(metadata.get("flowdata", "")), file)[0]


def layout_of(file: Place) -> dict[str, list[Any]]:
    """Return where the tensors of a safetensors file lie: dtype, first byte and end of each.

    Raises:
        StoreError: the file's header is damaged.
    """
    begin, header = _header(file)
    try:
        return {
            name: [entry["dtype"], *(begin + place for place in entry["data_offsets"])]
            for name, entry in header.items()
            if name != "__metadata__"
        }
    except (KeyError, TypeError) as error:
        raise StoreError(f"{file} is damaged: its header tells of no tensors") from error


def _header(path: Place) -> tuple[int, dict[str, Any]]:
    """The byte at which a safetensors file's tensors begin, and what its header says.

    | length: 8 bytes | header: JSON of so many bytes | the tensors' bytes … |
                                                      ^ begin, from which data_offsets count
    """
    # A damaged length may be any number: no more is read than the file holds.
    length = int.from_bytes(beginning_of(path, 8), "little")
    content = beginning_of(path, 8 + length)[8:]
    try:
        header = json.loads(content)
    except (ValueError, RecursionError) as error:
        raise StoreError(f"{path} is damaged: its header is {error}") from None
    if not isinstance(header, dict) or not isinstance(header.get("__metadata__", {}), dict):
        raise StoreError(f"{path} is damaged: its header should be an object")
    return 8 + len(content), header


def tensors_at(content: bytes, layout: Mapping[str, Any]) -> Columns:
    """Return the one-dimensional tensors that lie at a layout's places in a damaged file.

    Where the file was cut, zeros stand in for the bytes that it lacks: the checksums of packs say
    afterwards which values are the true ones.

    Raises:
        StoreError: the layout is damaged.
    """
    tensors: Columns = {}
    try:
        for name, (dtype, first, end) in layout.items():
            # A cut file may lack as much as it still has, and 1 MiB more. A layout that reaches
            # further is taken for damaged, so that it can't ask for all memory.
            if not 0 <= first <= end <= 2 * len(content) + 2**20:
                raise ValueError(f"tensor {name!r} can't lie in bytes {first} to {end}")
            values = bytearray(content[first:end].ljust(end - first, b"\0"))
            kind = _DTYPES[dtype]
            tensors[name] = torch.frombuffer(values, dtype=kind) if values else torch.empty(0)
    except (ValueError, TypeError, KeyError, AttributeError) as error:
        raise StoreError(f"no tensors where they should be: {error}") from None
    return tensors


def _canonical(value: Any) -> bytes:
    """JSON that is the same, byte for byte, for equal values."""
    return json.dumps(value, sort_keys=True, separators=(",", ":")).encode()
