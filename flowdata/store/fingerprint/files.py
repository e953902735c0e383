"""The files that rows of a Hugging Face data set name and don't hold: pictures, sounds."""

from __future__ import annotations

import hashlib
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import Any

from flowdata.store.fingerprint.values import canonical

_FIELDS = {"bytes", "path"}  # of what a row keeps of a file: its content, or where it is
_BLOCK = 1 << 20  # bytes of a file that are in memory at a time


def columns_of_files(dataset: Any) -> list[str]:
    """Return the names of a Hugging Face data set's columns that may name files."""
    return [field.name for field in dataset.features.arrow_schema if _may_name_files(field.type)]


def _may_name_files(kind: Any) -> bool:
    if hasattr(kind, "value_type"):  # of a list
        return _may_name_files(kind.value_type)
    fields = {field.name: field.type for field in kind} if hasattr(kind, "get_field_index") else {}
    return fields.keys() == _FIELDS or any(map(_may_name_files, fields.values()))


def files_of(dataset: Any, indices: Iterable[int]) -> Iterator[Path]:
    """Yield the paths of the files that rows name and don't hold, as far as they are there.

    Args:
        dataset: Hugging Face's.
        indices: of the rows.
    """
    names = columns_of_files(dataset)
    if not names:
        return
    rows = dataset.select_columns(names).with_format("arrow")
    for index in indices:
        row = rows[index]
        paths = (path for name in names for path in _paths(row[name].to_pylist()))
        yield from (Path(path) for path in paths if _size_of(path) is not None)


def _paths(value: Any) -> Iterator[str]:
    if isinstance(value, list):
        for item in value:
            yield from _paths(item)
    elif isinstance(value, dict):
        if value.keys() != _FIELDS:
            yield from _paths(list(value.values()))
        elif value["bytes"] is None and value["path"] is not None:
            yield value["path"]


def update_from_files(digest: hashlib._Hash, paths: Iterable[Path]) -> None:
    """Feed the contents of files into a digest, block by block."""
    for path in paths:
        digest.update(canonical(["file", path.stat().st_size]))
        with path.open("rb") as file:
            while block := file.read(_BLOCK):
                digest.update(block)


def named_by_size(array: Any) -> Any:
    """Return an Arrow array of structs with the name and size of each file in place of its path.

    A folder may lie elsewhere on another machine, and be copied at another time. Structs of other
    fields, contents that are held, and paths of what is not there stay as they are.

    Args:
        array: without nulls.
    """
    import pyarrow as pa

    if {field.name for field in array.type} != _FIELDS:
        return array
    parts = dict(zip([field.name for field in array.type], array.flatten(), strict=True))
    has_content = parts["bytes"].is_valid().to_pylist()
    if all(has_content):
        return array
    paths = zip(parts["path"].to_pylist(), has_content, strict=True)
    places = [path if path is None or is_held else _place(path) for path, is_held in paths]
    parts["path"] = pa.array(places, parts["path"].type)
    return pa.StructArray.from_arrays(list(parts.values()), fields=list(array.type))


def _place(path: str) -> str:
    size = _size_of(path)
    return path if size is None else f"{Path(path).name} {size}"


def _size_of(path: str) -> int | None:
    """A file's size in bytes; None where there is no file, as of one on the net."""
    try:
        return Path(path).stat().st_size if Path(path).is_file() else None
    except (OSError, ValueError):
        return None
