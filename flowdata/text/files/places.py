"""Where rows are: the files that a source names, or that it is a hub id."""

from __future__ import annotations

import difflib
import glob
import re
from pathlib import Path

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
# What `datasets` writes beside the data; the last two are in the folders of saved data sets.
_NOTES = ("dataset_info.json", "dataset_infos.json", "state.json", "dataset_dict.json")
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
    return any((folder / name).is_file() for name in _NOTES[2:])


def hub_id(source: str) -> str | None:
    """Return the hub id that a source is; None where it names something on this machine.

    What looks like a file or lies below a folder that is here is never taken for a hub id: a
    mistyped name is not sent to the network.

    Example:
        >>> hub_id("openai/gsm8k"), hub_id("data.jsonl"), hub_id("hf://datasets/openai/gsm8k")
        ('openai/gsm8k', None, 'openai/gsm8k')
    """
    if source.startswith(HUB_PREFIX):
        return source.removeprefix(HUB_PREFIX)
    path = Path(source)
    is_local = path.exists() or path.parent.exists() or kind_of(path) is not None
    return None if is_local or not _HUB_ID.fullmatch(source) else source


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
        files = [Path(name) for name in sorted(glob.glob(str(path), recursive=True))]  # noqa: PTH207
        files = [file for file in files if file.is_file()]
        if not files:
            raise FileNotFoundError(_nothing_at(source, path))
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


def _files_below(folder: Path, split: str) -> list[Path]:
    """The data files in a folder; those of one split where their names tell splits."""
    names = (path for path in sorted(folder.rglob("*")) if path.is_file())
    files = [path for path in names if kind_of(path) and path.name not in _NOTES]
    if not files:
        raise ValueError(f"{folder} holds no file of a kind that is read: {', '.join(KINDS)}")
    from datasets.data_files import DataFilesDict, get_data_patterns

    # These are the rules by which the hub tells splits apart by the names of files.
    splits = DataFilesDict.from_patterns(get_data_patterns(str(folder)), base_path=str(folder))
    if split not in splits:
        raise ValueError(
            f"{folder} has no split {split!r}; there are {', '.join(map(str, splits))}"
        )
    chosen = {Path(name).resolve() for name in splits[split]}
    return [file for file in files if file.resolve() in chosen]


def _remedy_for(file: Path) -> str:
    """What to do about a file of another kind."""
    if file.suffix.lower() in (".xlsx", ".xls", ".ods"):
        return ". Save the sheet as CSV"
    if file.suffix.lower() in (".zip", ".tar", ".7z"):
        return ". Unpack it, and name the folder"
    return "" if file.suffix else ". Give it the ending of what it holds"


def _nothing_at(source: str, path: Path) -> str:
    if glob.has_magic(source):
        return f"no file matches {source}"
    names = [file.name for file in path.parent.iterdir()] if path.parent.is_dir() else []
    close = difflib.get_close_matches(path.name, names, n=1)
    hint = f"; there is {path.parent / close[0]}" if close else ""
    if path.name == source and not path.suffix:
        hint += "; hub data sets are named owner/name"
    elif _HUB_ID.fullmatch(source) and kind_of(path) is None:
        hint += f"; if it is on the hub, write {HUB_PREFIX}{source}"
    return f"there is no file or folder {source}{hint}"
