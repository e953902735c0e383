"""Parts: files of packs that a run of scoring has finished, so that the next run goes on from them.

A part holds whole packs. Their tensors lie one pack after another in the columns, and `pack` says
which packs they are:

    parts/3f….safetensors      pack        [ 7        2    ]
                               loss, …     [ l l l    l l  ]

Parts have random names and are never changed, so that several ranks can write at once.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from time import monotonic
from types import TracebackType

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.errors import StoreError
from flowdata.store.format import Manifest, read_file, skipped_in, store_digest, write_file
from flowdata.store.packs import Columns, join, split
from flowdata.store.places import Place, files_in

PARTS = "parts"

# A crash loses what was scored since the last part: at most 10 seconds, or a hundredth of the time
# so far if that is more. The share keeps the files few: a run of 10 hours writes about 450 parts,
# where one every 10 seconds would make 3600.
_SECONDS, _SHARE = 10.0, 0.01


@dataclass(frozen=True)
class FinishedPacks:
    """Packs that are scored.

    Attributes:
        packs: the columns of each pack, by its number.
        skipped: why samples of the packs could not be read, by the sample's index.
    """

    packs: dict[int, Columns] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def add(self, packs: Mapping[int, Columns], skipped: Mapping[int, str]) -> None:
        """Take packs that are not there yet; one that two ranks scored is the same from both."""
        self.packs.update({pack: packs[pack] for pack in packs.keys() - self.packs.keys()})
        self.skipped.update(skipped)


class PartWriter:
    """Collects packs and writes them as parts; a context, at whose end the rest is written.

    A crash loses at most 10 seconds, or a hundredth of the time so far.

    Args:
        folder: the store.
        manifest: its manifest, already written.
    """

    def __init__(self, folder: Place, manifest: Manifest) -> None:
        self.parts = folder / PARTS
        self.parts.mkdir(exist_ok=True)
        self.manifest = manifest
        self.start_time = self.last_write = monotonic()
        self.waiting: dict[int, Columns] = {}
        self.skipped: dict[int, str] = {}

    def add(self, pack: int, columns: Columns, skipped: Mapping[int, str]) -> None:
        """Take one pack's columns, and why samples of it were skipped, by index."""
        self.waiting[pack] = columns
        self.skipped.update(skipped)
        now = monotonic()
        if now - self.last_write >= max(_SECONDS, _SHARE * (now - self.start_time)):
            self.flush()

    def flush(self) -> None:
        """Write the packs collected since the last part as one part."""
        self.last_write = monotonic()
        if self.waiting:
            tensors = {**join(list(self.waiting.values())), "pack": torch.tensor([*self.waiting])}
            manifest = self.manifest.copy()
            manifest["skipped"] = {str(index): reason for index, reason in self.skipped.items()}
            manifest.pop("layout", None)  # of scores.safetensors
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
        except OSError as write_error:
            if error is None:
                raise
            # The error that ended the run is the one to raise, not the full disk it met at its end.
            count = len(self.waiting)
            logger.warning("the last %d packs could not be kept: %s", count, write_error)


def parts_of(folder: Place) -> list[Place]:
    """Return the files of a store's parts; drafts, whose names begin with a dot, are none."""
    files = files_in(folder / PARTS)
    return [file for file in files if file.suffix == ".safetensors" and file.name[0] != "."]


def packs_of_part(file: Place, store: str, sizes: Tensor) -> FinishedPacks:
    """Return a part's packs.

    Args:
        file: the part.
        store: the digest of the store it should belong to.
        sizes: (packs,) int64, the plan's samples in each pack.

    Raises:
        StoreError: it is damaged, of another store, or doesn't hold what a part holds.
    """
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
    sizes_here = sizes[packs]
    _check_columns(tensors, int(sizes_here.sum()), file)
    columns = split(tensors, sizes_here)
    by_number = dict(zip(packs.tolist(), columns, strict=True))
    return FinishedPacks(by_number, skipped_in(manifest))


def _check_columns(columns: Columns, samples: int, file: Place) -> None:
    """Refuse columns that are not one value for each sample, or one for each target."""
    targets = int(columns["count"].sum())
    for name, values in columns.items():
        dtype = torch.int64 if name == "count" else torch.float32
        length = targets if name == "token_loss" else samples
        if values.shape != (length,) or values.dtype != dtype:
            raise StoreError(f"{file} does not hold one {name} for every sample of its packs")
    if (columns["count"] < 0).any():
        raise StoreError(f"{file} holds negative counts")
