"""Tables: Parquet and Arrow files, saved data sets and those of the hub, through `datasets`."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Any

from flowdata._common.excerpts import one_line
from flowdata.text.conversation import Row


class TableStream:
    """Rows of a `datasets` data set without the nulls that Arrow adds to the objects in them.

    Arrow gives every object of a column the names of all the others, and null for a value: a
    tool's parameters would come to a chat template with those of every other tool. What is kept as
    JSON text (`datasets.Json`) has the nulls that it was written with, and keeps them.

    Args:
        dataset: a stream, which has no length.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __iter__(self) -> Iterator[Row]:
        return map(self.without_nulls, self.dataset)

    def first(self, count: int) -> TableStream:
        """Return the first rows alone."""
        return type(self)(self.dataset.take(count))

    def without_nulls(self, row: Row) -> Row:
        """Return a row without the nulls that Arrow added to its objects."""
        features = self.dataset.features or {}  # a stream may know none
        return {name: _without_nulls(value, features.get(name)) for name, value in row.items()}


class Table(TableStream):
    """Rows of a data set that has a length, by index as well."""

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Row:
        return self.without_nulls(self.dataset[index])


def read_table_files(kind: str, files: list[Path], *, streaming: bool) -> TableStream:
    """Return the rows of Parquet or Arrow files, as one table.

    Args:
        kind: ``"parquet"`` or ``"arrow"``.
        files: of one schema.
        streaming: whether rows are read while they are used, and none is kept.

    Raises:
        ValueError: a file is damaged or of another kind than its name says.
    """
    import datasets

    names = [str(file) for file in files]
    try:
        dataset = datasets.load_dataset(kind, data_files=names, split="train", streaming=streaming)
        if streaming:
            next(iter(dataset), None)
    except Exception as error:  # of many classes, each with the reader's own as its cause
        raise ValueError(f"{names[0]} can't be read: {_in_one_line(error)}") from None
    return _as_rows(dataset)


def read_saved(folder: Path, split: str | None) -> Table:
    """Return the rows of a data set that `save_to_disk` wrote, with all of their columns.

    A format that was saved with it, of some columns or as tensors, is not applied.

    Raises:
        ValueError: it has splits, and none by that name; or a split is named, and it has none.
    """
    import datasets

    dataset = datasets.load_from_disk(str(folder))
    if isinstance(dataset, dict):
        name = split or "train"
        if name not in dataset:
            raise ValueError(f"{folder} has no split {name!r}; there are {', '.join(dataset)}")
        dataset = dataset[name]
    elif split is not None and split != str(dataset.split):
        raise ValueError(f"split={split!r} goes with data sets that have splits; {folder} has none")
    return Table(dataset.with_format(None))


def read_hub(
    name: str, *, split: str, configuration: str | None, revision: str | None, streaming: bool
) -> TableStream:
    """Return the rows of a data set on the hub.

    Raises:
        ValueError: the hub gave none, with its reason.
    """
    import datasets

    try:
        dataset = datasets.load_dataset(
            name, configuration, split=split, revision=revision, streaming=streaming
        )
    except Exception as error:  # of many classes: no network, no such name, no such split
        raise ValueError(
            f"there is no file or folder {name!r} here, and the hub gave no data set for it "
            f"({_in_one_line(error)})"
        ) from None
    return _as_rows(dataset)


def _as_rows(dataset: Any) -> TableStream:
    return Table(dataset) if hasattr(dataset, "__len__") else TableStream(dataset)


def _in_one_line(error: Exception) -> str:
    reason = error.__cause__ if isinstance(error.__cause__, Exception) else error
    return f"{type(reason).__name__}: {one_line(reason)}"[:400]


def _without_nulls(value: Any, feature: Any) -> Any:
    """A value without the nulls in its objects, as far as they may be Arrow's.

    Args:
        value: of a column, or within it.
        feature: what `datasets` takes it for; None where that is not known.
    """
    if type(feature).__name__ == "Json":  # earlier versions of `datasets` have no such class
        return value
    inner: Any
    if isinstance(value, dict):
        inner = feature if isinstance(feature, dict) else {}
        return {k: _without_nulls(v, inner.get(k)) for k, v in value.items() if v is not None}
    if isinstance(value, list):
        inner = feature[0] if isinstance(feature, list) else getattr(feature, "feature", None)
        return [_without_nulls(item, inner) for item in value]
    return value
