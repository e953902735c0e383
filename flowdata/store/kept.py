"""Tensors that are kept in a file of their own, so that they are made once."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from flowdata.store.format import make_manifest, read_file, write_file
from flowdata.store.identity import check_identity
from flowdata.store.places import place_of

_REMEDY = "Name another file, or delete this one if what it keeps is unwanted"


def check_name(store: str | Path | None, dataset_id: str | None) -> None:
    """Refuse a name for a data set's content where nothing is kept by it.

    Raises:
        ValueError: there is a `dataset_id` and no `store`.
    """
    if store is None and dataset_id is not None:
        raise ValueError(
            f"dataset_id={dataset_id!r} names the samples of what store= keeps, and would be "
            "ignored without it; pass a store, or leave dataset_id out"
        )


def keep(
    store: str | Path, identity: dict[str, Any], make: Callable[[], Mapping[str, Tensor]]
) -> Mapping[str, Tensor]:
    """Return tensors by name from their file, or make them and write the file.

    Args:
        store: the file, ``*.safetensors``, by its path or its URL.
        identity: what the tensors depend on, JSON-like.
        make: called if there is no file.

    Raises:
        ValueError: the file has another ending.
        ScoreMismatchError: the file's tensors have another identity.
    """
    file = place_of(store)
    if file.suffix != ".safetensors":
        raise ValueError(f"store must name a file *.safetensors, got {str(file)!r}")
    if file.exists():
        tensors, manifest = read_file(file)
        check_identity(manifest["identity"], identity, f"the file {file}", _REMEDY)
        return tensors
    new = make()
    write_file(file, {name: t.cpu() for name, t in new.items()}, make_manifest(identity, {}, {}))
    return new
