"""What is whole in a store, and what is not."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from flowdata.errors import StoreError
from flowdata.store.folder import SCORES, check_folder, read_manifest, read_store
from flowdata.store.format import (
    MANIFEST,
    manifest_in,
    read_file,
    store_digest,
)
from flowdata.store.parts import parts_of


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
        str(file.relative_to(folder)): _state(file, folder) for file in [*files, *parts_of(folder)]
    }
    if not (folder / SCORES).exists():
        findings[SCORES] = "not there yet: scoring is not finished" if findings else "not there"
    return findings


def _state(file: Path, folder: Path) -> str:
    try:
        if file.name == MANIFEST:
            identity = manifest_in(file)["identity"]
            if (folder / SCORES).exists() and _identity_in(folder / SCORES) not in (None, identity):
                return f"{file} belongs to other scores than {SCORES}"
        elif file.name == SCORES:
            read_store(file)
        else:
            manifest = read_file(file)[1]
            if store_digest(manifest) != store_digest(read_manifest(folder) or manifest):
                return f"{file} belongs to another store"
    except (StoreError, OSError) as error:
        return str(error)
    return "whole"


def _identity_in(file: Path) -> Any:
    """The identity that a file of scores tells; None if it is damaged."""
    try:
        return manifest_in(file)["identity"]
    except (StoreError, OSError):
        return None
