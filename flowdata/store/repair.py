"""Repair: taking from a damaged store all that it still proves, whole packs and a lost manifest."""

from __future__ import annotations

from collections.abc import Iterator

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
    skipped_in,
    store_digest,
    tensors_at,
    write_manifest,
)
from flowdata.store.packs import Columns, checksums, places, reorder, split
from flowdata.store.parts import FinishedPacks, packs_of_part, parts_of
from flowdata.store.places import Place


def repair_manifest(folder: Place) -> None:
    """Write manifest.json anew from a whole scores.safetensors if it is missing or damaged."""
    try:
        manifest_in(folder / MANIFEST)
    except (StoreError, OSError):
        file = folder / SCORES
        write_manifest(folder, {**manifest_in(file), "layout": layout_of(file)})


def read_finished_packs(
    folder: Place, manifest: Manifest, order: Tensor, sizes: Tensor
) -> Iterator[FinishedPacks]:
    """Yield every pack that earlier runs finished and that can be trusted, file by file.

    A pack that two ranks scored comes twice, and is the same from both.

    Args:
        folder: the store.
        manifest: its manifest.
        order: (N,) int64, the plan's order: sample ``order[i]`` is the i-th of the packs' samples.
        sizes: (packs,) int64, the plan's samples in each pack.
    """
    for file in parts_of(folder):
        try:
            packs = packs_of_part(file, store_digest(manifest), sizes)
        except ConnectionError:  # of object storage: the part may well be whole
            raise
        except (StoreError, OSError) as error:
            logger.warning("%s; what it held is scored again", error)
        else:
            yield packs
    file = folder / SCORES
    if file.exists():  # it must be damaged: a whole one would have been loaded instead
        whole_packs = _whole_packs(file, manifest, order, sizes)
        logger.warning("%d of %d packs of %s are whole", len(whole_packs), len(sizes), file)
        yield FinishedPacks(whole_packs, skipped_in(manifest))


def _whole_packs(
    file: Place, manifest: Manifest, order: Tensor, sizes: Tensor
) -> dict[int, Columns]:
    """The packs of a damaged scores.safetensors whose checksum agrees.

    The file keeps samples in the data set's order; the checksums are of packs, in the plan's. So
    the columns are put in the plan's order first. A damaged byte then changes the checksum of
    those packs alone whose values, counts or places it belongs to.
    """
    try:
        # The header may be what is damaged, so manifest.json says once more where tensors lie.
        tensors = tensors_at(file.read_bytes(), manifest.get("layout") or layout_of(file))
    except ConnectionError:
        raise
    except (StoreError, OSError):
        return {}
    stored_sums = tensors.pop("pack_checksum", torch.empty(0))
    offsets = tensors.pop("token_offset", None)
    of_samples = tensors.keys() - {"token_loss"}
    if stored_sums.shape != sizes.shape or not {"loss", "count"} <= of_samples:
        return {}
    if any(tensors[name].shape != order.shape for name in of_samples):
        return {}
    if tensors["count"].dtype != torch.int64:
        return {}
    if "token_loss" in tensors:
        if offsets is None or offsets.shape != (len(order) + 1,) or offsets.dtype != torch.int64:
            return {}
        _place_targets(tensors, offsets)
    columns = reorder(tensors, order)
    agrees = stored_sums == checksums(columns, sizes, store_digest(manifest))
    packs = split(columns, sizes)
    return {pack: packs[pack] for pack in agrees.nonzero().flatten().tolist()}


def _place_targets(tensors: Columns, offsets: Tensor) -> None:
    """Take the targets' losses from where the stored offsets say, in place.

    The counts alone would not do: a damaged count would move the targets of all later samples,
    and so cost their packs too. A sample whose count and offsets disagree gets no targets; its
    pack's checksum then differs, and the pack is scored again.
    """
    starts, ends = offsets[:-1], offsets[1:]
    counts, losses = tensors["count"], tensors["token_loss"]
    agrees = (starts >= 0) & (counts >= 0) & (starts + counts == ends) & (ends <= len(losses))
    tensors["count"] = counts.where(agrees, 0)
    tensors["token_loss"] = losses[places(starts, tensors["count"])]
