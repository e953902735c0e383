"""Probes that are kept in a file, so that they are made once."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

from torch import Tensor

from flowdata.store.format import make_manifest, read_file, write_file
from flowdata.store.identity import check_identity


def keep(file: Path, name: str, identity: dict[str, Any], make: Callable[[], Tensor]) -> Tensor:
    """Return a tensor from its file, or make it and write the file.

    Args:
        file: ``*.safetensors``.
        name: the tensor's, in the file.
        identity: what the tensor depends on, JSON-like.
        make: called if there is no file.

    Raises:
        ValueError: the file has another ending.
        ScoreMismatchError: the file's tensor has another identity.
    """
    if file.suffix != ".safetensors":
        raise ValueError(f"store must name a file *.safetensors, got {str(file)!r}")
    if file.exists():
        tensors, manifest = read_file(file)
        check_identity(manifest["identity"], identity, f"the file {file}", "Name another file")
        return tensors[name]
    tensor = make()
    write_file(file, {name: tensor}, make_manifest(identity, {}, {}))
    return tensor
