"""The fingerprint of a function: what it does, by its code and by what it captures."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

from flowdata.store.fingerprint.model import new_describer, say_gaps
from flowdata.store.fingerprint.values import canonical


def fingerprint_callable(function: Callable[..., Any] | None) -> str:
    """Return the digest of what a function does: code, defaults, captured values, globals it names.

    What the digest can't hold is named through the logger, once.
    """
    describer = new_describer()
    description = describer.describe(function, getattr(function, "__name__", "the callable"))
    say_gaps("function", describer)
    return hashlib.sha256(canonical(description)).hexdigest()
