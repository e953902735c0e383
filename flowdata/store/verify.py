"""Verification: which files of a store are whole, and what is wrong with the others."""

from __future__ import annotations

from typing import Any

from flowdata.errors import StoreError
from flowdata.store.folder import SCORES, check_folder, read_manifest, read_store
from flowdata.store.format import (
    MANIFEST,
    OldFormatError,
    manifest_in,
    read_file,
    store_digest,
)
from flowdata.store.parts import PARTS, parts_of
from flowdata.store.places import Place

_WHOLE = "whole"


def verify_store(folder: Place) -> dict[str, str]:
    """Return, for each file of a store by its name, ``"whole"`` or what is wrong with it.

    Raises:
        FileNotFoundError: there is no folder.
        StoreError: it is not a store, or one of an earlier format.
    """
    if not folder.is_dir():
        raise FileNotFoundError(f"there is no store at {folder}")
    check_folder(folder)
    states = {}
    if (folder / SCORES).exists():
        states[SCORES] = _state_of_scores(folder / SCORES)
    if (folder / MANIFEST).exists():
        states[MANIFEST] = _state_of_manifest(folder / MANIFEST, folder / SCORES)
    for part in parts_of(folder):
        states[f"{PARTS}/{part.name}"] = _state_of_part(part, folder)
    if SCORES not in states:
        states[SCORES] = "not there yet: scoring is not finished" if states else "not there"
    return states


def _state_of_scores(file: Place) -> str:
    try:
        read_store(file)
    except OldFormatError:
        raise
    except (StoreError, OSError) as error:
        return str(error)
    return _WHOLE


def _state_of_manifest(file: Place, scores: Place) -> str:
    try:
        identity = manifest_in(file)["identity"]
    except OldFormatError:
        raise
    except (StoreError, OSError) as error:
        return str(error)
    if _identity_of_scores(scores) not in (None, identity):
        return f"{file} belongs to other scores than {SCORES}"
    return _WHOLE


def _identity_of_scores(file: Place) -> Any:
    """The identity that a file of scores tells; None if it is damaged or not there."""
    try:
        return manifest_in(file)["identity"]
    except (StoreError, OSError):
        return None


def _state_of_part(file: Place, folder: Place) -> str:
    try:
        manifest = read_file(file)[1]
        if store_digest(manifest) != store_digest(read_manifest(folder) or manifest):
            return f"{file} belongs to another store"
    except OldFormatError:
        raise
    except (StoreError, OSError) as error:
        return str(error)
    return _WHOLE
