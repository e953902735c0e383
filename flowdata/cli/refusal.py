"""A store that refuses a run: its message, with the options that were changed before it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

from flowdata.errors import ScoreMismatchError, StoreError
from flowdata.store.folder import read_manifest
from flowdata.store.places import Place

_OPTIONS = ("max_length", "truncation", "chat_template", "template_options")
_OF_DATA = ("source", "split", "configuration", "revision", "limit")


@contextmanager
def explained_refusal(store: Place, details: Mapping[str, Any]) -> Iterator[None]:
    """Add to a refusal what the identity doesn't tell: it holds the tokens, not what made them.

    Args:
        store: the folder.
        details: of this run, as the store would keep them.
    """
    try:
        yield
    except ScoreMismatchError as error:
        changes = _changes(store, details)
        told = f"changed since {store} was made: {'; '.join(changes)}. " if changes else ""
        raise ScoreMismatchError(f"{told}{error}") from error


def _changes(store: Place, details: Mapping[str, Any]) -> list[str]:
    """The options that the store's run had otherwise, in words."""
    try:
        manifest = read_manifest(store)
    except StoreError:
        return []
    before = {} if manifest is None else manifest["details"]
    pairs = [(name, before.get(name), details.get(name)) for name in _OPTIONS]
    data, data_now = before.get("data", {}), details.get("data", {})
    pairs += [(name, data.get(name), data_now.get(name)) for name in _OF_DATA]
    return [
        f"{name.replace('_', ' ')} was {old}, is {new}"
        for name, old, new in pairs
        if old != new and before
    ]
