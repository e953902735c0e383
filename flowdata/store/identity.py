"""Identity: what must agree for losses to be reused."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from flowdata.errors import ScoreMismatchError
from flowdata.store.fingerprint import fingerprint_dataset

CONTENT_PREFIX = "content:"  # of a data set's identity that was read off its samples


def content_identity(dataset: Any, *, skip_unreadable: bool = False) -> str:
    """Return a data set's identity as read off its samples (see `fingerprint_dataset`)."""
    return CONTENT_PREFIX + fingerprint_dataset(dataset, skip_unreadable=skip_unreadable)


def check_identity(
    kept: Mapping[str, Any],
    wanted: Mapping[str, Any],
    what: str,
    remedy: str = "Score into another folder, or delete this one if its losses are unwanted",
) -> None:
    """Raise ScoreMismatchError with what differs unless both identities are the same."""
    names = [name for name in {**wanted, **kept} if kept.get(name) != wanted.get(name)]
    if names:
        differing = "; ".join(
            f"{name}: {what} has {shortened(kept, name)}, this run {shortened(wanted, name)}"
            for name in names
        )
        raise ScoreMismatchError(
            f"{what} was made with another {' and '.join(names)} ({differing}). {remedy}"
        )


def shortened(fields: Mapping[str, Any], name: str) -> str:
    """A field as it is shown in a message: its beginning where it is long."""
    if name not in fields:
        return "none"
    text = json.dumps(fields[name])
    closing = text[-1] if text[0] in '"[{' else ""
    return text if len(text) <= 60 else f"{text[:44]}…{closing}"
