"""Parts: what a run of scoring has finished so far, and the next run needn't do again."""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from time import monotonic
from types import TracebackType

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.errors import StoreError
from flowdata.store.format import Manifest, read_file, store_digest, write_file
from flowdata.store.packs import Columns, join, split

PARTS = "parts"
_SECONDS, _SHARE = 10.0, 0.01  # a crash loses at most so long, or so much of the time so far


@dataclass(frozen=True)
class Kept:
    """Packs that are done, by number, and why samples of them were skipped, by index."""

    packs: dict[int, Columns] = field(default_factory=dict)
    skipped: dict[int, str] = field(default_factory=dict)

    def add(self, packs: Mapping[int, Columns], skipped: Mapping[int, str]) -> None:
        """Take packs that are not there yet."""
        self.packs.update({pack: packs[pack] for pack in packs.keys() - self.packs.keys()})
        self.skipped.update(skipped)


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
            manifest = self.manifest.copy()
            manifest["skipped"] = self.skipped
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


def parts_of(folder: Path) -> list[Path]:
    """Return the files of a store's parts."""
    return [file for file in sorted((folder / PARTS).glob("[!.]*.safetensors")) if file.is_file()]


def packs_of_part(
    file: Path, store: str, sizes: Tensor
) -> tuple[dict[int, Columns], dict[int, str]]:
    """Return a part's packs by number, and why samples of them were skipped, by index.

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
