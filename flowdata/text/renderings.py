"""A rendering: a text that a template or a row gives, and which part of it is the target."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass


@dataclass(frozen=True)
class Rendering:
    """One text, whose tokens are one sequence, and where its targets are.

    Attributes:
        text: all of it.
        num_messages: how many of its chat's messages it holds, from the first; 0 of a bare text.
        targets: (start, end) of the characters that are targets, end excluded.
        prompt: what `text` begins with where prompt and completion are given apart. The targets
            begin where the tokens of the two part; None is a text whose `targets` are given.
    """

    text: str
    num_messages: int = 0
    targets: tuple[tuple[int, int], ...] = ()
    prompt: str | None = None

    def target_text(self) -> str:
        """Return the text of the targets; that of a pair is all after its prompt."""
        if self.prompt is not None:
            return self.text[common_length(self.prompt, self.text) :]
        return "".join(self.text[start:end] for start, end in self.targets)


def common_length(first: Sequence[object], second: Sequence[object]) -> int:
    """Return how many items two sequences have in common from their beginning.

    Example:
        >>> common_length("<user>a<bot><think>", "<user>a<bot>b")
        12
    """
    length = min(len(first), len(second))
    if first[:length] == second[:length]:
        return length
    return next(index for index in range(length) if first[index] != second[index])
