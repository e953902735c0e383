"""The results file of a study: a run as one JSON line, checked before it is written."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any, TypeAlias

import numpy as np
from torch import Tensor

from flowdata._common.notices import logger
from flowdata._common.real_numbers import as_float, as_python

KINDS = ("target", "retained")  # of measures and of test items: of the new task, of the old one
Record: TypeAlias = dict[str, Any]


def checked(measures: Any, where: str) -> Record:
    """Return what a run returned, its measures as floats.

    Args:
        measures: as `run_study` takes them of its `run`.
        where: the run, for the message.

    Raises:
        TypeError, ValueError: no page can be made of it.
    """
    if not isinstance(measures, Mapping):
        raise TypeError(
            f"{where}: run must return a mapping with validation, target and retained, got "
            f"{type(measures).__name__}"
        )
    missing = [name for name in ("validation", *KINDS) if name not in measures]
    if missing:
        raise ValueError(
            f"{where}: run returned no {missing[0]!r}, only {', '.join(map(repr, measures))}; it "
            "must return validation, a number, and target and retained, measures by name"
        )
    numbers: Record = {"validation": _number(measures["validation"], f"{where}: validation")}
    for kind in KINDS:
        by_name = measures[kind]
        if not isinstance(by_name, Mapping):
            raise TypeError(
                f"{where}: {kind} must hold measures by name, such as {{'accuracy': 80.0}}, got "
                f"{by_name!r}"
            )
        numbers[kind] = {
            str(name): _number(value, f"{where}: {kind}[{name!r}]")
            for name, value in by_name.items()
        }
    drifts = measures.get("drift", {})
    if not isinstance(drifts, Mapping) or not all(isinstance(d, Mapping) for d in drifts.values()):
        raise TypeError(
            f"{where}: drift must hold Drift.to_dict() by the names of probes, such as "
            f"{{'new task': meter(model).to_dict()}}, got {drifts!r}"
        )
    return {**measures, **numbers}


def _number(value: Any, what: str) -> float:
    number = as_float(value)
    if number is None:
        raise TypeError(f"{what} must be a number, got {value!r}")
    return number


def as_json(value: Any) -> str:
    """Return a value as JSON: numbers of NumPy and PyTorch, words of all else that JSON lacks."""

    def plain(part: Any) -> Any:
        number = as_python(part)
        if number is not part:
            return number
        return part.tolist() if isinstance(part, Tensor | np.ndarray) else str(part)

    return json.dumps(value, default=plain)


def key_of(record: Record) -> str:
    """Return a text that identifies a run: its options, method, rate and seed."""
    return json.dumps(
        [record[name] for name in ("options", "method", "rate", "seed")], sort_keys=True
    )


def read_records(path: str | Path) -> list[Record]:
    """Return the runs of a results file; a line that a killed process left torn is skipped."""
    path = Path(path)
    if not path.exists():
        return []
    records = []
    for text in filter(None, path.read_text().splitlines()):
        try:
            records.append(json.loads(text))
        except ValueError:
            logger.warning("%s: a torn line is left out: %r", path, text[:60])
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a run as one line, in one write: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that was killed may have left half a line. A line break ends it here: the new line
    # would else be a part of it and be skipped with it.
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    text = "\n" * is_torn + as_json(record) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)
