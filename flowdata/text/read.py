"""Loading what the command line names: rows of data, models, tokenizers."""

from __future__ import annotations

import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from flowdata.text.tokens import Row


def read_rows(source: str, *, split: str = "train", limit: int | None = None) -> Sequence[Row]:
    """Return the rows of a JSONL or Parquet file, a saved data set's folder, or a hub data set.

    Raises:
        FileNotFoundError: a file is named that is not there.
        ValueError: no rows, a line that is not a JSON object (its number named), or a limit
            below 1.
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


def hide_progress() -> None:
    """Let models load without transformers' own progress bars."""
    _transformers().utils.logging.disable_progress_bar()


def load_model(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the causal language model at a hub id, a folder, or a GGUF file or folder."""
    transformers = _transformers()
    folder, options = _gguf(source)
    return transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype="auto", trust_remote_code=trust_remote_code, **options
    )


def load_tokenizer(source: str, *, trust_remote_code: bool = False) -> Any:
    """Return the tokenizer at a hub id, a folder, or a GGUF file or folder.

    Raises:
        ValueError: there is none.
    """
    transformers = _transformers()
    folder, options = _gguf(source)
    try:
        return transformers.AutoTokenizer.from_pretrained(
            folder, trust_remote_code=trust_remote_code, **options
        )
    except (OSError, ValueError, TypeError, AttributeError, KeyError) as error:
        raise ValueError(
            f"no tokenizer could be loaded from {source} ({_reason(error)}); "
            "name one with --tokenizer"
        ) from None


def _read_jsonl(path: Path, limit: int | None) -> list[Row]:
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
    import datasets

    if path.suffix == ".parquet":
        return datasets.Dataset.from_parquet(str(path))
    loaded = datasets.load_from_disk(source) if path.is_dir() else _from_hub(source, split)
    return loaded[split] if isinstance(loaded, dict) else loaded


def _from_hub(source: str, split: str) -> Any:
    import datasets

    try:
        return datasets.load_dataset(source, split=split)
    except Exception as error:
        raise ValueError(
            f"{source!r} is no .jsonl or .parquet file or folder here, and the hub gave no data "
            f"set for it ({_reason(error)})"
        ) from None


def _gguf(source: str) -> tuple[str, dict[str, str]]:
    """The folder to load from, and the GGUF file in it if that is all there is."""
    path = Path(source)
    if path.suffix == ".gguf":
        return str(path.parent), {"gguf_file": path.name}
    if path.is_dir() and not (path / "config.json").exists():
        found = sorted(file.name for file in path.glob("*.gguf"))
        if len(found) > 1:
            raise ValueError(f"{source} holds several GGUF files; name one: {', '.join(found)}")
        if found:
            return source, {"gguf_file": found[0]}
        raise ValueError(f"{source} holds neither a config.json nor a GGUF file: it is no model")
    return source, {}


def _reason(error: Exception) -> str:
    return f"{type(error).__name__}: {error}".splitlines()[0]


def _transformers() -> Any:
    try:
        import transformers
    except ImportError:
        raise ValueError('this needs transformers: pip install "flowdata[transformers]"') from None
    return transformers
