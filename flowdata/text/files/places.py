"""Where rows are: the files that a source names, or that it is a hub id."""

from __future__ import annotations

import difflib
import glob
import json
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from flowdata._common.notices import say_once

HUB_PREFIX = "hf://datasets/"
COMPRESSIONS = (".gz", ".bz2", ".xz", ".zst")
KINDS = {
    ".json": "json",
    ".jsonl": "json",
    ".ndjson": "json",
    ".jsonlines": "json",
    ".csv": "csv",
    ".tsv": "csv",
    ".txt": "text",
    ".text": "text",
    ".parquet": "parquet",
    ".arrow": "arrow",
}
_SAVED = ("state.json", "dataset_dict.json")  # in the folders of saved data sets alone
_NOTES = ("dataset_info.json", "dataset_infos.json", *_SAVED)  # of `datasets`, beside the data
_NOTES_IN_WORDS = (
    "readme",
    "license",
    "licence",
    "notice",
    "citation",
    "changelog",
    "requirements",
)
_LARGEST_NOTE = 2**20  # bytes
_ROWS_BELOW = ("data", "rows", "examples", "instances")  # names of an object's rows
_HUB_ID = re.compile(r"[\w][\w.-]*/[\w][\w.-]*")


def kind_of(path: Path) -> str | None:
    """Return how a file is read, by its name: json, csv, text, parquet or arrow; None if not.

    Example:
        >>> kind_of(Path("train.jsonl.gz")), kind_of(Path("train.xlsx"))
        ('json', None)
    """
    suffixes = [suffix.lower() for suffix in path.suffixes]
    is_compressed = bool(suffixes) and suffixes[-1] in COMPRESSIONS
    kind = KINDS.get(suffixes[-1 - is_compressed] if len(suffixes) > is_compressed else "")
    return None if is_compressed and kind in ("parquet", "arrow") else kind


def is_saved(folder: Path) -> bool:
    """Return whether a folder is a data set as `save_to_disk` writes it."""
    return any((folder / name).is_file() for name in _SAVED)


def rows_below(value: Mapping[str, Any]) -> list[Any] | None:
    """Return the rows that an object holds under a name of its own, as `{"data": [...]}`.

    Example:
        >>> rows_below({"version": 1, "data": [{"text": "a"}]}), rows_below({"text": "a"})
        ([{'text': 'a'}], None)
    """
    lists = (value[name] for name in _ROWS_BELOW if isinstance(value.get(name), list))
    return next((rows for rows in lists if rows and isinstance(rows[0], dict)), None)


def hub_id(source: str) -> str | None:
    """Return the hub id that a source is; None where it names something on this machine.

    What looks like a file, lies below a folder that is here, or is nearly the name of something
    that is here, is never taken for a hub id: a mistyped name is not sent to the network.

    Example:
        >>> hub_id("openai/gsm8k"), hub_id("data.jsonl"), hub_id("hf://datasets/openai/gsm8k")
        ('openai/gsm8k', None, 'openai/gsm8k')
    """
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    return None if is_local(source) or kind_of(Path(source)) is not None else source


def is_local(source: str) -> bool:
    """Return whether a name is of something on this machine, there or not, and no owner/name."""
    path = Path(source)
    is_here = path.exists() or path.parent.exists()
    return is_here or not _HUB_ID.fullmatch(source) or close_to(path) is not None


def close_to(path: Path) -> Path | None:
    """Return what is on this machine by nearly the same name; a folder above may differ, too."""
    if path.parent.is_dir():
        return _closest(path.name, path.parent)
    if path.parent == path:
        return None
    folder = _closest(path.parent.name, path.parent.parent)
    return _closest(path.name, folder) if folder is not None else None


def _closest(name: str, folder: Path) -> Path | None:
    files = sorted(folder.iterdir()) if folder.is_dir() else []
    names = {key: file for file in files for key in (file.name.partition(".")[0], file.name)}
    close = difflib.get_close_matches(name, names, n=1)
    return names[close[0]] if close else None


def files_of(source: str, split: str | None) -> list[Path]:
    """Return the files that a source on this machine names, in the order of their names.

    Args:
        source: a file, a folder, or a pattern such as `data/*.jsonl.gz`.
        split: of a folder whose files are named for splits; None is ``"train"`` there.

    Raises:
        FileNotFoundError: nothing is there.
        ValueError: files of a kind that is not read, or of several kinds, or files that are named
            themselves, which have no splits.
    """
    path = Path(source).expanduser()
    if split is not None and not path.is_dir():
        raise ValueError(f"split={split!r} goes with folders and hub data sets, not with {source}")
    if path.is_file():
        files = [path]
    elif path.is_dir():
        files = _files_below(path, split or "train")
    else:
        names = sorted(glob.glob(_pattern(path), recursive=True))  # noqa: PTH207
        files = [file for file in map(Path, names) if file.is_file()]
        if not files:
            raise FileNotFoundError(nothing_at(source, "data sets", f"write {HUB_PREFIX}{source}"))
    kinds = {kind_of(file): file for file in files}
    if None in kinds:
        raise ValueError(
            f"{kinds[None]} is of no kind that is read; there are {', '.join(KINDS)}, and "
            f"{', '.join(COMPRESSIONS)} of those that hold lines{_remedy_for(kinds[None])}"
        )
    if len(kinds) > 1:
        one, other = list(kinds.values())[:2]
        raise ValueError(
            f"{source} holds files of several kinds ({one.name}, {other.name}); "
            f"name one, or a pattern such as {other.parent / '*'}{other.suffix}"
        )
    return files


def _pattern(path: Path) -> str:
    """A pattern in which the brackets of folders that are there stand for themselves."""
    there = next(parent for parent in path.parents if parent.exists())
    rest = str(path.relative_to(there)) if there != Path() else str(path)
    return str(Path(glob.escape(str(there)), rest))


def _files_below(folder: Path, split: str) -> list[Path]:
    """The data files in a folder; those of one split where their names tell splits."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in names if kind_of(path) and path.name not in _NOTES]
    if not files:
        raise ValueError(f"{folder} holds no file of a kind that is read: {', '.join(KINDS)}")
    from datasets.data_files import DataFilesDict, get_data_patterns

    # These are the rules by which the hub tells splits apart by the names of files.
    base = glob.escape(str(folder))
    splits = DataFilesDict.from_patterns(get_data_patterns(base), base_path=base)
    if split not in splits:
        raise ValueError(
            f"{folder} has no split {split!r}; there are {', '.join(map(str, splits))}"
        )
    of_split = {Path(name).resolve() for name in splits[split]}
    of_any = {Path(name).resolve() for names in splits.values() for name in names}
    others = [file for file in files if file.resolve() not in of_any and not _is_note(file)]
    if others:
        say_once(
            f"{folder}: left out, as their names tell no split and those of other files do: "
            f"{', '.join(file.name for file in others)}; to read them, too, name a pattern, such "
            f"as {folder / '*'}{others[0].suffix}"
        )
    files = [file for file in files if file.resolve() in of_split]
    notes = [file for file in files if _is_note(file)]
    if 0 < len(notes) < len(files):
        say_once(f"{folder}: left out as notes: {', '.join(file.name for file in notes)}")
        files = [file for file in files if file not in notes]
    return files


def _is_note(file: Path) -> bool:
    """Whether a file tells of the data beside it: a README, or one JSON object that is no rows."""
    if file.suffix.lower() == ".txt":
        return file.stem.lower() in _NOTES_IN_WORDS
    if file.suffix.lower() != ".json" or file.stat().st_size > _LARGEST_NOTE:
        return False
    try:
        value = json.loads(file.read_bytes())
    except ValueError:
        return False
    return isinstance(value, dict) and rows_below(value) is None


def _remedy_for(file: Path) -> str:
    """What to do about a file of another kind."""
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return ". Save the sheet as CSV"
    if file.suffix.lower() in (".zip", ".tar", ".7z"):
        return ". Unpack it, and name the folder"
    return "" if file.suffix else ". Give it the ending of what it holds"


def nothing_at(source: str, things: str, remedy: str) -> str:
    """Return what to say of a name on this machine that nothing is at.

    Args:
        source: the name.
        things: what was to be there, in the plural.
        remedy: what to do about one that is on the hub all the same.
    """
    if glob.has_magic(source):
        return f"no file matches {source}"
    close = close_to(Path(source).expanduser())
    hint = f"; there is {close}" if close else ""
    if Path(source).name == source and not Path(source).suffix:
        hint += f"; hub {things} are named owner/name"
    elif _HUB_ID.fullmatch(source) and kind_of(Path(source)) is None:
        hint += f"; if it is on the hub, {remedy}"
    return f"there is no file or folder {source}{hint}"
