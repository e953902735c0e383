"""Rows into a file: JSON lines, Parquet, or a saved data set."""

from __future__ import annotations

import json
import re
import shutil
import uuid
from collections.abc import Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from flowdata._common.atomic import replacing
from flowdata._common.excerpts import FROM_0, one_line
from flowdata._common.notices import logger
from flowdata.text.conversation import Row
from flowdata.text.files.places import is_saved

# What Arrow raises on values of several types (its own errors are among these), or too large.
_NO_COLUMN = (TypeError, ValueError, OverflowError)
LINES = (".jsonl", ".ndjson", ".jsonlines")
PARQUET = ".parquet"
_ENDING = re.compile(r"\.[a-z]\w*")  # and not that of a version, as in `qwen2.5-weighted`


def check_output(path: Path, *, overwrite: bool) -> None:
    """Check, before hours of work, that rows can be written to a path.

    Raises:
        ValueError: its name tells no kind of file, or something is there that may not be replaced.

    Example:
        >>> check_output(Path("weighted.csv"), overwrite=False)
        Traceback (most recent call last):
        ValueError: weighted.csv is of no kind that is written; there are .jsonl, .ndjson, ...
    """
    suffix = path.suffix.lower()
    is_folder = not _ENDING.fullmatch(suffix)
    if not is_folder and suffix not in (*LINES, PARQUET):
        raise ValueError(
            f"{path} is of no kind that is written; there are {', '.join(LINES)}, {PARQUET}, and "
            "names without an ending for the folder of a saved data set"
        )
    if not path.exists() or (path.is_dir() and not any(path.iterdir())):
        return
    if not overwrite:
        raise ValueError(f"{path} is there already; name another file, or pass --overwrite")
    if path.is_dir() and not (is_folder and is_saved(path)):
        raise ValueError(f"{path} is a folder of other things, which --overwrite does not remove")
    if path.is_file() and is_folder:
        raise ValueError(f"{path} is a file, and a data set is saved into a folder")


def is_lines(path: Path) -> bool:
    """Return whether a file by this name is one of JSON lines, which is written row by row."""
    return path.suffix.lower() in LINES


def write_lines(rows: Iterable[Row], path: Path) -> None:
    """Write rows as JSON lines, whole or not at all: an error in `rows` leaves no file.

    Raises:
        ValueError: a row holds what JSON can't.
    """
    with replacing(path) as file:
        for number, row in enumerate(rows):
            try:
                line = json.dumps(row, ensure_ascii=False)
            except TypeError as error:
                raise ValueError(
                    f"row {number} holds what JSON can't ({error}); write {PARQUET}, which keeps "
                    f"types; {FROM_0}"
                ) from None
            file.write(line.encode() + b"\n")


def write_dataset(dataset: Any, path: Path) -> None:
    """Write a Hugging Face data set as a Parquet file, or save it into a folder, whole or not.

    Raises:
        ValueError: a column holds what Parquet can't.
    """
    if path.suffix.lower() == PARQUET:
        with replacing(path) as file:
            try:
                dataset.to_parquet(file)
            except NotImplementedError as error:  # Arrow's, of objects that are empty in every row
                raise ValueError(
                    f"a column holds what Parquet can't have ({one_line(error)}); write {LINES[0]}"
                ) from None
        return
    path.parent.mkdir(parents=True, exist_ok=True)
    draft = path.with_name(f".{path.name}.{uuid.uuid4().hex}")
    try:
        dataset.save_to_disk(draft)
        shutil.rmtree(path, ignore_errors=True)
        draft.rename(path)
    finally:
        shutil.rmtree(draft, ignore_errors=True)


def to_dataset(rows: Sequence[Row]) -> Any:
    """Return rows as a Hugging Face data set, which has the columns of all of them.

    A column whose values are of several types is one of JSON text, which `datasets` turns into the
    values again; it is said that other readers meet the text.

    Raises:
        ValueError: a column's values have no common type, in Arrow or in this version of datasets.
    """
    names = dict.fromkeys(name for row in rows for name in row)
    return _from_columns({name: [row.get(name) for row in rows] for name in names})


def with_columns(dataset: Any, values: Sequence[Mapping[str, Any]]) -> Any:
    """Return a Hugging Face data set with new columns, or others in the place of its own.

    Args:
        dataset: the data set.
        values: what each row gets, by column; without a value a row keeps its own, if it has one.

    Raises:
        ValueError: as `to_dataset`.
    """
    import datasets

    columns = {}
    for name in dict.fromkeys(name for row in values for name in row):
        is_partial = name in dataset.column_names and not all(name in row for row in values)
        rest = dataset[name] if is_partial else [None] * len(values)
        columns[name] = [row.get(name, own) for row, own in zip(values, rest, strict=True)]
    names = list(dict.fromkeys([*dataset.column_names, *columns]))
    others = [name for name in dataset.column_names if name not in columns]
    parts = [dataset.select_columns(others)] if others else []
    whole = datasets.concatenate_datasets([*parts, _from_columns(columns)], axis=1)
    return whole.select_columns(names)


def _from_columns(columns: Mapping[str, list[Any]]) -> Any:
    import datasets

    try:
        return datasets.Dataset.from_dict(columns)
    except _NO_COLUMN as error:
        reason = one_line(error)
    with suppress(*_NO_COLUMN):  # also of a version that knows no such columns
        dataset = datasets.Dataset.from_dict(columns, on_mixed_types="use_json")
        mixed = [repr(name) for name, kind in dataset.features.items() if "Json(" in repr(kind)]
        noun, verb = ("column", "holds") if len(mixed) == 1 else ("columns", "hold")
        logger.warning(
            f"{noun} {', '.join(mixed)} {verb} values of several types: `datasets` reads them as "
            "they are, and other readers find JSON text"
        )
        return dataset
    raise ValueError(
        f"a column holds values that Parquet and saved data sets can't have together ({reason}); "
        f"write {LINES[0]}"
    )
