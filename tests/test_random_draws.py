import math
from collections import Counter
from itertools import permutations

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdata._common.random_draws import (
    PERMUTATION,
    POINTS,
    CumulativeWeights,
    KeyedPermutation,
    multiply_high,
    random_words,
)
from tests import reference
from tests.plausible import chi_square_is_plausible


def test_any_part_of_a_stream_of_words_is_the_same_as_in_the_whole():
    whole = random_words((3, 1), POINTS, 0, 1000)
    for start, count in [(0, 1), (1, 7), (5, 995), (998, 2)]:
        np.testing.assert_array_equal(
            random_words((3, 1), POINTS, start, count), whole[start : start + count]
        )
    for other in [((3, 2), POINTS), ((4, 1), POINTS), ((3, 1), PERMUTATION)]:
        assert not np.isin(random_words(*other, 0, 1000), whole).any()


@given(st.lists(st.integers(0, 2**64 - 1), min_size=1), st.integers(0, 2**63 - 1))
def test_the_high_half_of_products_is_exact(words, factor):
    result = multiply_high(np.array(words, dtype=np.uint64), factor)
    assert result.tolist() == [word * factor >> 64 for word in words]


@pytest.mark.parametrize("size", [*range(1, 40), 1000, 10_007, 65_537])
def test_a_permutation_holds_every_value_once_in_whatever_order_it_is_asked(size):
    permutation = KeyedPermutation(size, (0, size))
    values = permutation(np.arange(size))
    assert sorted(values.tolist()) == list(range(size))
    some = np.arange(size)[::-3]
    np.testing.assert_array_equal(permutation(some), values[some])


def test_small_permutations_all_come_equally_often():
    orders = Counter(tuple(KeyedPermutation(4, (7, e))(np.arange(4)).tolist()) for e in range(4800))
    counts = np.array([orders[order] for order in permutations(range(4))])
    assert chi_square_is_plausible(counts, np.full(24, 200.0))


def test_no_value_or_pair_of_values_is_favoured_in_a_place():
    values = np.stack([KeyedPermutation(11, (5, e))(np.arange(11)) for e in range(6000)])
    for place in range(11):
        counts = np.bincount(values[:, place], minlength=11)
        assert chi_square_is_plausible(counts, np.full(11, 6000 / 11))
    pairs = np.bincount(values[:, 3] * 11 + values[:, 4], minlength=121).reshape(11, 11)
    assert pairs.diagonal().sum() == 0
    pairs = pairs[~np.eye(11, dtype=bool)]
    assert chi_square_is_plausible(pairs, np.full(110, 6000 / 110))


def test_a_permutation_has_no_visible_order():
    values = KeyedPermutation(100_000, (0, 0))(np.arange(100_000)) / 100_000
    for lag in (1, 2, 316, 317, 633):  # 317 is the grid's side
        assert abs(np.corrcoef(values[:-lag], values[lag:])[0, 1]) < 4 / math.sqrt(100_000)
    cells = np.histogram2d(np.arange(100_000), values, bins=20)[0].ravel()
    assert chi_square_is_plausible(cells, np.full(400, 250.0))
    pairs = np.histogram2d(values[:-1], values[1:], bins=20)[0].ravel()
    assert chi_square_is_plausible(pairs, np.full(400, 99_999 / 400))


@settings(deadline=None)
@given(
    st.lists(
        st.one_of(st.just(0.0), st.floats(1e-9, 1.0), st.floats(1e-300, 1e300)),
        min_size=1,
        max_size=300,
    ).filter(any)
)
def test_points_fall_on_the_sample_that_a_walk_finds(weights):
    table = CumulativeWeights(np.array(weights))
    ends = table._ends.tolist()
    integers = [end - start for start, end in zip([0, *ends], ends, strict=False)]
    points = {0, table.total // 3, table.total - 1}
    points |= {p for end in ends for p in (end - 1, end) if 0 <= p < table.total}
    points = sorted(points)
    expected = [reference.sample_at(integers, point) for point in points]
    assert table.find(np.array(points)).tolist() == expected
    share = [weight / math.fsum(weights) for weight in weights]
    assert [i / table.total for i in integers] == pytest.approx(share, abs=2**-60, rel=2**-50)
