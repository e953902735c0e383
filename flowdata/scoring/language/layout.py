"""The layout of a batch: which rectangles of it lie end to end, without padding.

Four samples share a prefix P of three tokens, which is run elsewhere, and the second and third
answer one prompt q. (Shared prompts and prefixes are longer than those of the picture.) Dots are
padding, and what lies behind a sample's last target:

    row 0    P P P a a a a a a .
    row 1    P P P q q q q b b b
    row 2    P P P q q q q c c .
    row 3    P P P d d d . . . .

Each piece is a rectangle of that batch, and its samples are padded to the longest of them alone:

    piece 0        piece 1    piece 2          piece 3
    a a a a a a    q q q q    b b b   c c .    d d d
    row 0          row 1      row 1   row 2    row 3
                              after piece 1

The samples of a piece become a block of attention (blocks.py). Those after another piece see that
piece, a prompt, before themselves. Samples are never reordered.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from flowdata.scoring.language.blocks import Block
from flowdata.scoring.language.packable import LEAST_SHARED


class Piece(NamedTuple):
    """A rectangle of a padded batch, which becomes a block.

    Attributes:
        rows: the samples.
        positions: the same for all samples.
        after: the number of the piece with the samples' prompt, where they share one.
    """

    rows: slice
    positions: slice
    after: int | None = None

    @property
    def block(self) -> Block:
        """The block of attention that the piece becomes."""
        samples = self.rows.stop - self.rows.start
        return Block(samples, self.positions.stop - self.positions.start, self.after)


class Neighbours(NamedTuple):
    """Samples that lie side by side and answer one prompt, or share none.

    Attributes:
        samples: how many.
        prompt_end: the position behind the prompt that all of them answer; 0 where they share
            none.
    """

    samples: int
    prompt_end: int


def lay_out(ids: Tensor, is_target: Tensor, skipped: int, most_padding: float) -> list[Piece]:
    """Return the pieces of a batch, in the order in which they lie.

    Args:
        ids: (B, T) int64, padded on the right.
        is_target: (B, T) bool, the positions with a target.
        skipped: positions of a common prefix, which no piece has.
        most_padding: see `cut_by_length`.
    """
    positions = torch.arange(1, ids.shape[1] + 1, device=ids.device)
    # Behind the last position with a target nothing is needed; one token of each sample is run
    # even if it has no target, because no block can be empty.
    ends = (is_target * positions).amax(1).clamp_min_(skipped + 1).tolist()
    pieces: list[Piece] = []
    row = 0
    for samples, prompt_end in find_neighbours(ids, is_target, skipped):
        start, after = skipped, None
        if prompt_end:
            start, after = prompt_end, len(pieces)
            pieces.append(Piece(slice(row, row + 1), slice(skipped, prompt_end)))
        lengths = [end - start for end in ends[row : row + samples]]
        for count, longest in cut_by_length(lengths, most_padding):
            pieces.append(Piece(slice(row, row + count), slice(start, start + longest), after))
            row += count
    return pieces


def find_neighbours(ids: Tensor, is_target: Tensor, skipped: int) -> list[Neighbours]:
    """Return a batch cut into neighbours: the answers to each shared prompt, and the others.

    A prompt is what lies before a sample's first position with a target. It is shared if all its
    tokens are the same and at least `LEAST_SHARED` of them are not skipped.
    """
    prompt_ends = is_target.long().argmax(1)
    positions = torch.arange(ids.shape[1], device=ids.device)
    is_same = ((ids[1:] == ids[:-1]) | (positions >= prompt_ends[1:, None])).all(1)
    is_same &= prompt_ends[1:] == prompt_ends[:-1]
    is_same &= prompt_ends[1:] - skipped >= LEAST_SHARED
    shares = [False, *is_same.tolist(), False]  # shares[i]: row i has the prompt of row i - 1
    neighbours: list[Neighbours] = []
    for row, prompt_end in enumerate(prompt_ends.tolist()):
        is_alone = not shares[row] and not shares[row + 1]
        both_alone = is_alone and bool(neighbours) and neighbours[-1].prompt_end == 0
        if shares[row] or both_alone:
            neighbours[-1] = neighbours[-1]._replace(samples=neighbours[-1].samples + 1)
        else:
            neighbours.append(Neighbours(1, 0 if is_alone else prompt_end))
    return neighbours


def cut_by_length(lengths: Sequence[int], most_padding: float) -> list[tuple[int, int]]:
    """Return runs of samples of like length: how many samples each has, and its longest length.

    Args:
        lengths: tokens of each sample, in the order in which they lie.
        most_padding: the share of a run's longest sample by which others may be shorter.

    Example:
        >>> cut_by_length([9, 10, 4, 4], most_padding=0.1)
        [(2, 10), (2, 4)]
    """
    runs: list[tuple[int, int]] = []
    count, longest, shortest = 0, 0, 0
    for length in lengths:
        low, high = min(length, shortest or length), max(length, longest)
        if count and low < high * (1 - most_padding):
            runs.append((count, longest))
            count, low, high = 0, length, length
        count, longest, shortest = count + 1, high, low
    return [*runs, (count, longest)]


def flatten(values: Tensor, pieces: Sequence[Piece]) -> Tensor:
    """Return (B, T) values as the pieces have them, end to end: (1, tokens)."""
    return torch.cat([values[piece.rows, piece.positions].reshape(-1) for piece in pieces])[None]
