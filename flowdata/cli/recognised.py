"""What was recognised in a data set: its format, and its first sample as the model will see it."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from flowdata.text.conversation import Row
from flowdata.text.encoding import Encoded
from flowdata.text.formats import Fields, read_columns, scored_part, unread_columns

_MOST_CHARACTERS = 600  # of one piece of the first sample, in a run; a preview shows it whole


@dataclass(frozen=True)
class Recognised:
    """What was recognised.

    Attributes:
        format: its name.
        columns: those that are read.
        further: those that are read where a row has them, and this one hasn't.
        unread: those that play no part.
        scored: which part of a row is scored, in words.
        first_sample: its pieces in order, each with whether its tokens are targets.
        tokens: of the first sample.
        targets: those of them that are scored.
    """

    format: str
    columns: list[str]
    further: list[str]
    unread: list[str]
    scored: str
    first_sample: list[tuple[str, bool]]
    tokens: int
    targets: int

    def text(self, *, whole: bool = False) -> str:
        """Return it for a reader; of a long sample the ends of its pieces, unless it is `whole`."""
        lines = [
            f"format: {self.format}, in {_list(self.columns)}",
            f"scored: {self.scored}",
            *([f"not read: {_list(self.unread)}"] if self.unread else []),
            *([f"read where a row has them: {_list(self.further)}"] if self.further else []),
            f"first sample: {self.targets} of its {self.tokens} tokens are targets",
        ]
        for piece, is_target in self.first_sample:
            margin = "  target > " if is_target else "  prompt | "
            excerpt = piece if whole else _shortened(piece)
            lines += [margin + line for line in excerpt.strip("\n").split("\n") if excerpt.strip()]
        return "\n".join(lines)


def recognise(row: Row, fields: Fields, sample: Encoded, tokenizer: Any) -> Recognised:
    """Return what was recognised.

    Args:
        row: the first row that can be read.
        fields: the columns that were found.
        sample: the tokens of the first sample, and which of them are targets.
        tokenizer: turns the first sample back into text.
    """
    ids, is_target = sample
    bounds = np.flatnonzero(np.diff(is_target)) + 1
    pieces = [
        (tokenizer.decode(part.tolist(), clean_up_tokenization_spaces=False), bool(flags[0]))
        for part, flags in zip(np.split(ids, bounds), np.split(is_target, bounds), strict=True)
        if len(part)
    ]
    return Recognised(
        format=fields.name,
        columns=read_columns(row, fields),
        further=[name for name in fields.columns() if name not in row],
        unread=unread_columns(row, fields),
        scored=scored_part(row, fields),
        first_sample=pieces,
        tokens=len(ids),
        targets=int(is_target[1:].sum()),
    )


def _list(names: list[str]) -> str:
    return ", ".join(map(repr, names)) or "none"


def _shortened(text: str) -> str:
    half = _MOST_CHARACTERS // 2
    return text if len(text) <= _MOST_CHARACTERS else f"{text[:half]} … {text[-half:]}"
