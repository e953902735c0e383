"""Rows of text: from a JSONL or Parquet file, a saved data set, or the hub."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowdata.text.conversation import Row


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> Sequence[Row]:
    """Return the rows of a JSONL or Parquet file, a saved data set's folder, or a hub data set.

    Args:
        source: the path or hub id.
        split: of a hub data set, or of a saved folder that has splits.
        limit: how many rows are read, from the first; None reads all.

    Raises:
        FileNotFoundError: `source` names a file that is not there.
        ValueError: there are no rows, a line is not a JSON object (its number is named), or
            `limit` is below 1.
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    path = Path(source)
    if path.suffix in (".jsonl", ".json", ".parquet") and not path.exists():
        raise FileNotFoundError(f"there is no file {source}")
    rows: Sequence[Row]
    if path.suffix in (".jsonl", ".json"):
        rows = _read_jsonl(path, limit)
    else:
        rows = _read_dataset(path, source, split)
        if limit is not None and limit < len(rows):
            rows = rows.select(range(limit))  # type: ignore[attr-defined]
    if len(rows) == 0:
        raise ValueError(f"{source} holds no rows")
    return rows


def _read_jsonl(path: Path, limit: int | None) -> list[Row]:
    """The rows of a JSONL file; no line after the limit is parsed."""
    rows: list[Row] = []
    with path.open(encoding="utf-8") as lines:
        for number, line in enumerate(lines, start=1):
            if limit is not None and len(rows) == limit:
                break
            if not line.strip():
                continue
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: not JSON ({error})") from None
            if not isinstance(row, dict):
                raise ValueError(
                    f"{path}, line {number}: should be a JSON object, is {type(row).__name__}"
                )
            rows.append(row)
    return rows


def _read_dataset(path: Path, source: str, split: str) -> Any:
    import datasets  # here, as it is slow to import and JSONL files are read without it

    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    dataset = datasets.load_from_disk(source) if path.is_dir() else _from_hub(source, split)
    return dataset[split] if isinstance(dataset, dict) else dataset  # a folder may hold all splits


def _from_hub(source: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:  # of many classes: no network, no such name, no such split
        raise ValueError(
            f"{source!r} is no .jsonl or .parquet file or folder here, and the hub gave no data "
            f"set for it ({first_line(error)})"
        ) from None


def first_line(error: Exception) -> str:
    """Return an error's class and the first line of its text, for a message."""
    return f"{type(error).__name__}: {error}".splitlines()[0]
