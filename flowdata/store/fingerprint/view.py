"""How a Hugging Face data set shows its rows: format, columns, decoding."""

from __future__ import annotations

import dataclasses
import hashlib
from collections.abc import Iterator, Mapping
from typing import Any

from flowdata.store.fingerprint.model import new_describer
from flowdata.store.fingerprint.values import canonical

_BESIDE_DECODING = ("id", "dtype", "pa_type", "_type", "device", "num_ffmpeg_threads")


def describe_view(dataset: Any) -> dict[str, str]:
    """Return digests of a Hugging Face data set's format, columns and decoding, by these names.

    A data set that shows all of its columns as Python values, none of them decoded, has none.
    """
    settings, parts = dataset.format, {}
    kind, columns = settings["type"], settings["columns"]
    if kind not in (None, "python", "custom"):
        options = new_describer().describe(settings["format_kwargs"], "the format")
        parts["format"] = _hash([kind, options])
    if columns is not None and set(columns) != set(dataset.column_names):
        parts["columns"] = _hash([sorted(columns), bool(settings["output_all_columns"])])
    decoding = list(_decoding("", dataset.features))
    if decoding:
        parts["decoding"] = _hash(sorted(decoding))
    return parts


def _decoding(place: str, feature: Any) -> Iterator[list[Any]]:
    """Yield, of each feature that is decoded when it is read, its place, class and settings."""
    if hasattr(feature, "decode") and dataclasses.is_dataclass(feature):
        fields = {field.name: getattr(feature, field.name) for field in dataclasses.fields(feature)}
        settings = {name: fields[name] for name in sorted(fields) if name not in _BESIDE_DECODING}
        yield [place, type(feature).__name__, str(settings)]
    elif isinstance(feature, Mapping):
        for name, inner in feature.items():
            yield from _decoding(f"{place}.{name}", inner)
    elif isinstance(feature, list | tuple):
        for inner in feature:
            yield from _decoding(f"{place}[]", inner)
    elif hasattr(feature, "feature"):
        yield from _decoding(f"{place}[]", feature.feature)


def _hash(content: Any) -> str:
    return hashlib.sha256(canonical(content)).hexdigest()
