"""Excerpts: values and errors in messages, cut to a readable length."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

FROM_0 = "rows count from 0"  # said wherever a message numbers rows: lines of files count from 1
_MOST_CHARACTERS, _BEGINNING = 60, 44  # so that a message with two values takes a few lines


def excerpt_of(fields: Mapping[str, Any], name: str) -> str:
    """Return the field `name` as JSON, or ``none``; of a long value only the beginning.

    Example:
        >>> excerpt_of({"model": "ab" * 40}, "model")
        '"abababababababababababababababababababababa…"'
        >>> excerpt_of({"samples": 6}, "samples"), excerpt_of({}, "samples")
        ('6', 'none')
    """
    if name not in fields:
        return "none"
    text = json.dumps(fields[name])
    closing = text[-1] if text[0] in '"[{' else ""
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:_BEGINNING]}…{closing}"


def first_line(error: BaseException) -> str:
    r"""Return an error's class and the first line of its text, for a message.

    Example:
        >>> first_line(ValueError("no such layer\nat line 3")), first_line(RuntimeError())
        ('ValueError: no such layer', 'RuntimeError')
    """
    text = str(error).strip().partition("\n")[0]
    return f"{type(error).__name__}: {text}" if text else type(error).__name__


def one_line(error: BaseException) -> str:
    r"""Return an error's text in one line, for a message.

    Example:
        >>> one_line(ValueError("no such layer\n  at line 3"))
        'no such layer at line 3'
    """
    return " ".join(str(error).split())
