"""How a padded batch becomes pieces."""

import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdata.scoring.language.blocks import Block
from flowdata.scoring.language.layout import Neighbours, Piece, find_neighbours, flatten, lay_out

A, B, C, D = range(1, 5)  # tokens of four samples
PREFIX, PROMPT = [7, 8, 9], list(range(10, 20))


def batch(*rows):
    """Token ids and targets of samples, each a prompt and an answer, padded on the right."""
    ids = torch.nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt + answer) for prompt, answer in rows], batch_first=True
    )
    is_target = torch.zeros_like(ids, dtype=torch.bool)
    for row, (prompt, answer) in enumerate(rows):
        is_target[row, len(prompt) : len(prompt + answer)] = True
    return ids, is_target


def test_a_batch_with_a_prefix_and_a_shared_prompt():
    ids, is_target = batch(
        (PREFIX, [A] * 6), (PREFIX + PROMPT, [B] * 3), (PREFIX + PROMPT, [C] * 2), (PREFIX, [D] * 3)
    )
    pieces = lay_out(ids, is_target, skipped=3, most_padding=0.5)
    assert pieces == [
        Piece(slice(0, 1), slice(3, 9)),
        Piece(slice(1, 2), slice(3, 13)),
        Piece(slice(1, 3), slice(13, 16), after=1),
        Piece(slice(3, 4), slice(3, 6)),
    ]
    assert pieces[2].block == Block(2, 3, after=1)
    assert flatten(ids, pieces).tolist() == [[A] * 6 + PROMPT + [B] * 3 + [C, C, 0] + [D] * 3]


def test_samples_alone_are_neighbours_until_a_shared_prompt_comes():
    alone, shared = ([], [A] * 4), (PROMPT, [B])
    rows = batch(alone, alone, shared, shared, shared, alone, shared)
    expected = [Neighbours(2, 0), Neighbours(3, len(PROMPT)), Neighbours(2, 0)]
    assert find_neighbours(*rows, skipped=0) == expected


def test_two_shared_prompts_in_a_row_are_kept_apart():
    other = PROMPT[::-1]
    rows = batch((PROMPT, [A]), (PROMPT, [B]), (other, [A]), (other, [B, B]))
    assert find_neighbours(*rows, skipped=0) == [Neighbours(2, 10), Neighbours(2, 10)]


def test_a_prompt_that_the_prefix_holds_but_for_a_few_tokens_is_not_shared():
    rows = batch((PROMPT, [A]), (PROMPT, [B]))
    assert find_neighbours(*rows, skipped=3) == [Neighbours(2, 0)]


@given(st.lists(st.tuples(st.integers(0, 12), st.integers(0, 9)), min_size=1, max_size=12))
def test_every_needed_token_is_laid_out_once(sizes):
    rows = batch(*([([5] * prompt, [6] * (answer + 1)) for prompt, answer in sizes]))
    ids, is_target = rows
    places = torch.arange(ids.numel()).view_as(ids)
    pieces = lay_out(*rows, skipped=0, most_padding=0.25)
    flat = flatten(places, pieces)[0].tolist()
    assert len(flat) == len(set(flat))
    assert set(places[is_target].tolist()) <= set(flat)
    assert sum(p.block.samples * p.block.length for p in pieces) == len(flat)
