"""Rows of text: from files, a saved data set, or the hub."""

from __future__ import annotations

from pathlib import Path
from typing import Any, Literal

from flowdata._common.notices import say
from flowdata.text.files.lines import LineFiles
from flowdata.text.files.places import files_of, hub_id, is_saved, kind_of
from flowdata.text.files.tables import TableStream, read_hub, read_saved, read_table_files

_LARGE = 2**20  # bytes of a file


def read_rows(
    source: str,
    *,
    split: str | None = None,
    limit: int | None = None,
    configuration: str | None = None,
    revision: str | None = None,
    encoding: str = "utf-8",
    streaming: bool = False,
    on_error: Literal["raise", "skip"] = "raise",
) -> Any:
    """Return the rows of files, of a saved data set, or of a data set on the hub.

    Files are JSON lines or arrays, CSV, TSV and text, each also as `.gz`, `.bz2`, `.xz` or `.zst`,
    Parquet and Arrow. Text gives a row `{"text": str}` for each line that holds something; cells of
    CSV are text as they are written.

    Args:
        source: a file, a folder of files, a pattern such as `data/*.jsonl.gz`, the folder of a
            saved data set, or a hub id, `owner/name` or `hf://datasets/owner/name`.
        split: of a hub data set, or of a folder that has splits; None is ``"train"``.
        limit: how many rows are read, from the first; None reads all.
        configuration: of a hub data set; some have several.
        revision: of a hub data set: a branch, tag or commit.
        encoding: of JSON, CSV and text files.
        streaming: read rows while they are used, and keep none: what is returned can be passed
            over, again and again, but has no length. False returns a sequence.
        on_error: ``"skip"`` puts an `Unreadable` with the reason where a line is no row.

    Raises:
        FileNotFoundError: `source` names something on this machine that is not there.
        ValueError: there are no rows, a file is of a kind that is not read, or holds something
            else (the file and the line are named), an option goes with other sources, or `limit` is
            below 1.

    Example:
        >>> import tempfile
        >>> file = Path(tempfile.mkdtemp(), "data.csv")
        >>> _ = file.write_text("prompt,completion\\n2 + 2 =,4\\n")
        >>> read_rows(str(file))
        [{'prompt': '2 + 2 =', 'completion': '4'}]
    """
    if limit is not None and limit < 1:
        raise ValueError(f"limit must be at least 1, got {limit}")
    name = hub_id(source)
    if name is not None:
        _refuse_encoding(encoding, source)
        rows: Any = read_hub(
            name,
            split=split or "train",
            configuration=configuration,
            revision=revision,
            streaming=streaming,
        )
    elif configuration or revision:
        option = "configuration" if configuration else "revision"
        raise ValueError(f"{option} goes with data sets on the hub; {source} is on this machine")
    elif is_saved(Path(source).expanduser()):
        _refuse_encoding(encoding, source)
        rows = read_saved(Path(source).expanduser(), split)
    else:
        files = files_of(source, split)
        kind = kind_of(files[0])
        if kind in ("parquet", "arrow"):
            _refuse_encoding(encoding, source)
            rows = read_table_files(kind, files, streaming=streaming)
        else:
            lines = LineFiles(files, encoding=encoding, limit=limit, skip=on_error == "skip")
            if streaming:
                _say_read_whole(lines)
            rows = lines if streaming else list(lines)
    if limit is not None and isinstance(rows, TableStream):
        rows = rows.first(limit)
    if next(iter(rows), None) is None:
        raise ValueError(f"{source} holds no rows")
    return rows


def _refuse_encoding(encoding: str, source: str) -> None:
    """Raise ValueError for an encoding that tables would ignore."""
    if encoding != "utf-8":
        raise ValueError(
            f"encoding={encoding!r} goes with JSON, CSV and text files; {source} is none of them"
        )


def _say_read_whole(lines: LineFiles) -> None:
    """Say of a large file that it is read whole, though rows were to be read one by one."""
    large = (file for file in lines.files if file.stat().st_size > _LARGE)
    file = next(filter(lines.is_read_whole, large), None)
    if file is not None:
        say(
            f"{file} is one JSON object, which is read whole: arrays and lines are read while they "
            "are used"
        )
