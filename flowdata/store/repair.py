"""What a damaged store still proves: whole packs, a lost manifest."""

from __future__ import annotations

from pathlib import Path

import torch
from torch import Tensor

from flowdata._common.notices import logger
from flowdata.errors import StoreError
from flowdata.store.folder import SCORES
from flowdata.store.format import (
    MANIFEST,
    Manifest,
    layout_of,
    manifest_in,
    store_digest,
    tensors_at,
    write_manifest,
)
from flowdata.store.packs import Columns, checksums, places, reorder, split
from flowdata.store.parts import Kept, packs_of_part, parts_of


def repair_manifest(folder: Path) -> None:
    """Write manifest.json anew from a whole scores.safetensors, should it be missing or damaged."""
    try:
        manifest_in(folder / MANIFEST)
    except (StoreError, OSError):
        file = folder / SCORES
        write_manifest(folder, {**manifest_in(file), "layout": layout_of(file)})


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
