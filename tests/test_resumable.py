import re

import numpy as np
import pytest

from flowdata._common.resumable import check_natural, check_rank, check_state

NAMES = {"maker": "Walk", "what": "walk", "remedy": "Start anew"}


def test_a_state_of_the_same_identity_is_taken_whatever_else_it_holds():
    check_state({"seed": 1, "position": 7}, {"seed": 1}, **NAMES)


@pytest.mark.parametrize(
    ("state", "error", "message"),
    [
        ([], TypeError, "state_dict must be what Walk.state_dict returned, got list"),
        ({}, ValueError, "state_dict has seed=None, this walk 1: it was saved by another walk."),
        ({"seed": 2}, ValueError, "state_dict has seed=2, this walk 1: it was saved by another"),
    ],
)
def test_another_state_is_refused_with_the_entry_and_the_remedy(state, error, message):
    with pytest.raises(error, match=re.escape(message)):
        check_state(state, {"seed": 1}, **NAMES)
    with pytest.raises(ValueError, match=r"Start anew$"):
        check_state({}, {"seed": 1}, **NAMES)


def test_ranks_are_counted_from_0():
    check_rank(2, np.int64(3))
    for rank in (-1, 3, 1.0, "0", None):
        with pytest.raises(ValueError, match=r"rank must lie between 0 and num_replicas - 1 = 2,"):
            check_rank(rank, 3)
    for num_replicas in (0, 1.5, True, None):
        with pytest.raises(ValueError, match="num_replicas must be a positive integer, got"):
            check_rank(0, num_replicas)


def test_natural_numbers_are_integers_of_64_bits():
    assert type(check_natural("seed", np.int32(3))) is int
    assert check_natural("seed", 2**64 - 1) == 2**64 - 1
    for value in (-1, 1.5, True, "1", None):
        with pytest.raises(ValueError, match=f"seed must be an integer >= 0, got {value!r}"):
            check_natural("seed", value)
    with pytest.raises(ValueError, match="window must be an integer >= 1, got 0"):
        check_natural("window", 0, least=1)
    with pytest.raises(ValueError, match=r"seed must be below 2\^64, got"):
        check_natural("seed", 2**64)
