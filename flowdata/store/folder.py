"""The folder of a store, on a disk or at a URL: its checks, reading, writing and locking.

format.py specifies what lies in it.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata._common.offsets import offsets_of
from flowdata.errors import ScoreMismatchError, StoreError
from flowdata.store.format import (
    MANIFEST,
    Manifest,
    layout_of,
    make_manifest,
    manifest_in,
    read_file,
    store_digest,
    write_file,
    write_manifest,
)
from flowdata.store.lock import lock
from flowdata.store.packs import Columns, checksums, reorder
from flowdata.store.parts import PARTS, parts_of
from flowdata.store.places import Place, check_takes_parts, names_in

SCORES, LOCK = "scores.safetensors", ".lock"
_PACKS_AT_ONCE = 4096  # whose samples are copied to make their checksums


def read_manifest(folder: Place) -> Manifest | None:
    """Return the manifest of a store, None for a folder that is empty or not there yet.

    Raises:
        StoreError: the folder holds other things, or no manifest in it can be read.
    """
    check_folder(folder)
    first_error: StoreError | None = None
    # Every file of a store holds its manifest, so that a lost one is taken from the next.
    for file in (folder / MANIFEST, folder / SCORES, *parts_of(folder)):
        try:
            return manifest_in(file)
        except FileNotFoundError:
            continue
        except StoreError as error:
            logger.warning("%s", error)
            first_error = first_error or error
    if first_error is not None:
        raise first_error
    return None


def check_folder(folder: Place) -> None:
    """Raise StoreError unless a store is at `folder`, or could be begun there.

    A folder that holds other things is refused, so that no file of the user's is ever mixed with,
    or taken for, a file of a store.
    """
    for path in (folder, *folder.parents):
        if path.exists() and not path.is_dir():
            raise StoreError(f"{path} is a file; a store is a folder: pass another path")
    if (folder / PARTS).is_symlink():
        raise StoreError(f"{folder / PARTS} is a link: a store keeps its parts in itself")
    names = names_in(folder)
    # A process that was killed before it wrote a manifest may have left a lock and drafts.
    leftovers = (LOCK, f".{SCORES}", f".{MANIFEST}")
    contents = [name for name in names if not name.startswith(leftovers)]
    if contents and not {SCORES, MANIFEST}.intersection(contents) and not parts_of(folder):
        raise StoreError(
            f"{folder} is not a flowdata store: it has no {MANIFEST}, but holds {contents[0]}"
            f"{' and more' if len(contents) > 1 else ''}; "
            "pass a store's folder, or an empty or a new one to score into"
        )


def read_store(path: Place) -> tuple[Columns, Manifest]:
    """Return the tensors and the manifest of a finished store, or of one file of scores.

    Raises:
        FileNotFoundError: nothing is there.
        StoreError: it is not finished, damaged, or not a store.
    """
    if not path.exists():
        raise FileNotFoundError(f"there is no store at {path}")
    file = path / SCORES if path.is_dir() else path
    if not file.exists():
        if read_manifest(path) is None:
            raise StoreError(f"{path} is empty: it is not a store yet")
        raise StoreError(
            f"{path} is not finished: make the same call of LossScorer.score or flowdata "
            "score again; it goes on where it stopped"
        )
    tensors, manifest = read_file(file)
    if "pack" in tensors or not {"loss", "count"} <= tensors.keys():
        raise StoreError(f"{file} is no file of scores: it lacks a loss and count of each sample")
    _check_shapes(tensors, file)
    return tensors, manifest


def _check_shapes(tensors: Columns, file: Place) -> None:
    """Refuse tensors that are not one value for each sample, or one for each target."""
    shape, count = tuple(tensors["loss"].shape), tensors["count"]
    if len(shape) != 1 or shape[0] == 0 or count.dtype != torch.int64:
        raise StoreError(f"{file} is damaged: it holds no loss and count of each sample")
    shapes: dict[str, tuple[int, ...]] = dict.fromkeys(tensors, shape)
    if "token_loss" in tensors:
        shapes |= {"token_loss": (int(count.sum()),), "token_offset": (shape[0] + 1,)}
    shapes.pop("pack_checksum", None)  # there is one for each pack, and the plan is not known here
    for name, shape in shapes.items():
        if name in tensors and tensors[name].shape != shape:
            raise StoreError(
                f"{file} is damaged: {name!r} has shape {tuple(tensors[name].shape)}, where "
                f"{shape} belongs"
            )


def write_store(tensors: Columns, manifest: Manifest, path: Place) -> Place:
    """Write tensors as a finished store, or as one file if `path` ends in `.safetensors`.

    Args:
        tensors: `loss`, `count` and what else a file of scores may hold (see format.py).
        manifest: the store's.
        path: a folder, or a file.

    Returns:
        `path`.

    Raises:
        ScoreMismatchError: the folder is the store of other scores, finished or begun.
    """
    file = path
    if path.suffix != ".safetensors":
        stored_manifest, file = read_manifest(path), path / SCORES
        if stored_manifest is not None and stored_manifest["identity"] != manifest["identity"]:
            raise ScoreMismatchError(
                f"{path} holds the scores of another data set, model or option; save into another "
                "folder, or delete this one if its losses are unwanted"
            )
    write_file(file, tensors, manifest)
    return path


def finish(
    folder: Place, tensors: Columns, manifest: Manifest, order: Tensor, sizes: Tensor
) -> None:
    """Write the complete tensors, then remove the parts they were merged from.

    Args:
        folder: the store.
        tensors: in data set order.
        manifest: the store's.
        order: (N,) int64, the plan's order: sample ``order[i]`` is the i-th of the packs' samples.
        sizes: (packs,) int64, the plan's samples in each pack.
    """
    columns = {name: tensors[name] for name in tensors.keys() - {"token_offset"}}
    sums = _sums_of_packs(columns, order, sizes, store_digest(manifest))
    # In this order a crash at any point leaves a store that is whole or can be gone on with: the
    # parts are removed last, and the layout describes a file that is there.
    write_file(folder / SCORES, {**tensors, "pack_checksum": sums}, manifest)
    write_manifest(folder, {**manifest, "layout": layout_of(folder / SCORES)})
    for part in parts_of(folder):
        part.unlink()
    with suppress(OSError):  # the folder isn't there, or holds files of somebody else
        (folder / PARTS).rmdir()


def _sums_of_packs(columns: Columns, order: Tensor, sizes: Tensor, key: str) -> Tensor:
    """The packs' checksums, (packs,) int64, of a few packs' samples at a time.

    The arguments are those of `finish`, and of `checksums`.
    """
    bounds = offsets_of(sizes).tolist()
    sums = []
    for first in range(0, len(sizes), _PACKS_AT_ONCE):
        last = min(first + _PACKS_AT_ONCE, len(sizes))
        few = reorder(columns, order[bounds[first] : bounds[last]])
        sums.append(checksums(few, sizes[first:last], key, first))
    return torch.cat(sums)


def update_details(folder: Place, details: Mapping[str, Any]) -> None:
    """Replace the notes for readers in a finished store, if they differ; all else stays."""
    as_read = make_manifest({}, {}, details)["details"]
    if manifest_in(folder / SCORES)["details"] == as_read:
        return
    tensors, manifest = read_file(folder / SCORES)
    # A folder that can only be read keeps the notes that it has, which are of the same losses.
    with suppress(PermissionError), locked(folder):
        manifest = {**manifest, "details": as_read}
        write_file(folder / SCORES, tensors, manifest)
        write_manifest(folder, {**manifest, "layout": layout_of(folder / SCORES)})


@contextmanager
def locked(folder: Place) -> Iterator[None]:
    """Hold the store's lock for a block.

    Drafts that a killed process left half written are removed first: under the lock nobody else
    writes.

    Raises:
        StoreError: other things are there, or the place can't take parts.
    """
    check_takes_parts(folder)
    check_folder(folder)
    folder.mkdir(parents=True, exist_ok=True)
    with lock(folder / LOCK, what=f"scoring into {folder}"):
        if isinstance(folder, Path):  # object storage has no drafts
            for name in (f".{SCORES}.*", f".{MANIFEST}.*", f"{PARTS}/.*.safetensors.*"):
                for draft in folder.glob(name):
                    draft.unlink(missing_ok=True)
        yield
