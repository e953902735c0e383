"""The text of a sample, as a page shows it: who says what, which of it is learned, and how much."""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TypeAlias

# Control characters but tab and newline, those that turn the direction of all text behind them, and
# halves of characters: a sample that holds one could hide or rearrange what the page says.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069\ud800-\udfff]")


@dataclass(frozen=True)
class Piece:
    """A piece of a sample's text.

    Attributes:
        text: what is said.
        role: who says it: ``"system"``, ``"user"``, ``"assistant"``, or another name.
        is_target: whether it is a target, which the model learns to say.
    """

    text: str
    role: str = ""
    is_target: bool = False


SampleText: TypeAlias = "str | Sequence[Piece]"


def shorten(text: SampleText, limit: int) -> list[Piece]:
    """Return a sample's pieces, cut to a number of characters, with what can't be seen spelt out.

    Args:
        text: the sample's.
        limit: characters of all pieces together; short pieces leave their rest to longer ones.

    Example:
        >>> [piece.text for piece in shorten([Piece("a" * 50), Piece("Yes.")], 10)]
        ['aaaaaa … (44 more characters)', 'Yes.']
    """
    pieces = _spelt_out(text)
    shares = _shares([len(piece.text) for piece in pieces], limit)
    return [
        replace(piece, text=_beginning(piece.text, share))
        for piece, share in zip(pieces, shares, strict=True)
    ]


def _shares(lengths: Sequence[int], limit: int) -> list[int]:
    shares = [0] * len(lengths)
    order = sorted(range(len(lengths)), key=lengths.__getitem__)
    for place, piece in enumerate(order):
        shares[piece] = min(lengths[piece], limit // (len(order) - place))
        limit -= shares[piece]
    return shares


def is_longer(text: SampleText, limit: int) -> bool:
    """Return whether `shorten` would cut a sample's text."""
    return sum(len(piece.text) for piece in _spelt_out(text)) > limit


def _spelt_out(text: SampleText) -> list[Piece]:
    """A sample's pieces, with what can't be seen spelt out."""
    whole = [Piece(text)] if isinstance(text, str) else text
    return [
        replace(piece, text=spelt_out(piece.text), role=spelt_out(piece.role)) for piece in whole
    ]


def spelt_out(text: str) -> str:
    r"""Return a text with what can't be seen, and what would turn or break a page, as its code.

    Example:
        >>> spelt_out("a\u202eb")
        'a\\x202eb'
    """
    return _INVISIBLE.sub(_escape, text)


def _escape(match: re.Match[str]) -> str:
    return f"\\x{ord(match[0]):02x}"


def _beginning(text: str, limit: int) -> str:
    more = len(text) - limit
    return text if more <= 0 else f"{text[:limit].rstrip()} … ({more:,} more characters)"
