"""Random draws as pure functions of (seed, epoch, position): nothing here has a state to save.

Integers throughout: cumulative weights are exact, so that the order of the summation, the
machine and the position asked for first change nothing.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

PERMUTATION, OFFSET, POINTS, NOISE, ACCEPTANCE = range(5)  # what a stream of words is used for
_TOTAL_BITS = 62  # of the largest sum of weights made integer
_CHUNK = 1 << 18  # weights that are in float64 at a time


def random_words(key: tuple[int, int], purpose: int, start: int, count: int) -> Words:
    """Return words `start` … `start + count` of a stream of random bits: (count,) uint64.

    Philox4x64-10, the counter-based generator of Salmon et al., SC 2011: any word costs as
    much as the first.

    Args:
        key: (seed, epoch), each below 2^64.
        purpose: one of the constants above; streams of different purposes are independent.
        start: first word, >= 0.
        count: number of words.
    """
    block, skip = divmod(start, 4)
    counter = np.array([block, 0, 0, purpose], dtype=np.uint64)
    philox = np.random.Philox(counter=counter, key=np.array(key, dtype=np.uint64))
    words: Words = philox.random_raw(skip + count)
    return words[skip:]


def multiply_high(words: Words, factor: int) -> Words:
    """Return floor(words · factor / 2^64) exactly, for a factor below 2^63."""
    low_half, half = np.uint64(0xFFFFFFFF), np.uint64(32)
    high, low = words >> half, words & low_half
    factor_high, factor_low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    middle = high * factor_low + (low * factor_low >> half)
    carry = low * factor_high + (middle & low_half)
    result: Words = high * factor_high + (middle >> half) + (carry >> half)
    return result


class KeyedPermutation:
    """A permutation of 0 … size − 1 whose value at any position costs the same: no list is kept.

    A Feistel network over rows × columns (Black and Rogaway, CT-RSA 2002): half-rounds shift
    the row by a random function of the column and the column by one of the row. With about √size
    rows and columns the random functions are small tables of true random numbers. The grid has
    fewer than √size + 1 cells too many; a position that lands there is sent on until it is back.
    """

    def __init__(self, size: int, key: tuple[int, int]) -> None:
        self.size = size
        self.rows = math.isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)
        # Small grids mix worse: with these rounds no order of 6 is 1 % likelier than another.
        rounds = max(3, 12 - size.bit_length() // 2)
        sides = np.array([self.rows, self.columns] * rounds)[:, None]
        words = random_words(key, PERMUTATION, 0, len(sides) * self.rows).reshape(len(sides), -1)
        # Shifts lie in [-side, 0), so that a sign tells whether a side has to be added again.
        self._shifts = list((words % sides.astype(np.uint64)).astype(np.int64) - sides)

    def __call__(self, positions: Ints) -> Ints:
        """Return the values at `positions`: (K,) int64 in [0, size) each."""
        values = self._scramble(positions)
        while (outside := np.flatnonzero(values >= self.size)).size:
            values[outside] = self._scramble(values[outside])
        return values

    def _scramble(self, positions: Ints) -> Ints:
        row = positions // self.columns
        column = positions - row * self.columns
        for row_shifts, column_shifts in zip(self._shifts[::2], self._shifts[1::2], strict=True):
            row += row_shifts.take(column)
            row += self.rows & (row >> 63)  # all ones where the row has fallen below 0
            column += column_shifts.take(row)
            column += self.columns & (column >> 63)
        result: Ints = row * self.columns + column
        return result


class CumulativeWeights:
    """Weights as exact integers, summed up, and the sample that lies at a point of the sum.

    Weights are scaled by a power of two and rounded, so that their sum is just below 2^62.

    Args:
        weights: (N,) float32 or float64, finite, >= 0, not all zero; read in chunks, not kept.
    """

    def __init__(self, weights: NDArray[np.floating]) -> None:
        self._ends = np.empty(len(weights), dtype=np.int64)  # where each sample's share ends
        exponent = _TOTAL_BITS - math.ceil(math.log2(sum_of(weights)))
        # A table of guides (Chen and Asau, 1974): points of bucket b lie at sample guide[b] or
        # after it. It is the number of samples that end at or before the bucket's start.
        bits = (len(weights) // 2).bit_length()
        self._shift = _TOTAL_BITS - bits
        self._guide = np.zeros(2**bits + 2, dtype=np.min_scalar_type(-len(weights) - 1))
        self.total = done = 0
        for chunk in chunks(weights):
            ends = self._ends[done : done + len(chunk)]
            np.cumsum(np.rint(np.ldexp(chunk, exponent)).astype(np.int64), out=ends)
            ends += self.total
            bucket = (ends + ((1 << self._shift) - 1)) >> self._shift
            counts = np.bincount(bucket - bucket[0])
            self._guide[bucket[0] : bucket[0] + len(counts)] += counts.astype(self._guide.dtype)
            self.total = int(ends[-1])
            done += len(chunk)
        np.cumsum(self._guide, dtype=self._guide.dtype, out=self._guide)

    def find(self, points: Ints) -> Ints:
        """Return the sample that each point of [0, total) falls on: (K,) int64."""
        bucket = points >> self._shift
        samples = self._guide.take(bucket).astype(np.int64)
        widest = int((self._guide.take(bucket + 1) - samples).max(initial=0))
        for bit in reversed(range(widest.bit_length())):  # skip 2^bit samples that end before
            step = 1 << bit
            last_skipped = self._ends.take(samples + (step - 1), mode="clip")
            samples += (last_skipped <= points) * step
        return samples


def systematic_points(strata: Ints, total: int, num_samples: int, offset: int) -> Ints:
    """Return the point floor((stratum · total + offset) / num_samples) of every stratum, exactly.

    Systematic resampling (Kitagawa, 1996): one random offset for all, so that a share of the
    total is hit within one of as often as it deserves.

    Args:
        strata: (K,) int64 in [0, num_samples), with num_samples below 2^31.
        total: below 2^63.
        num_samples: number of equal strata that the total is cut into.
        offset: in [0, total), from `systematic_offset`.
    """
    step, step_rest = divmod(total, num_samples)
    shift, shift_rest = divmod(offset, num_samples)
    points: Ints = strata * step + shift + (strata * step_rest + shift_rest) // num_samples
    return points


def systematic_offset(total: int, key: tuple[int, int]) -> int:
    """Return the epoch's random offset, uniform in [0, total)."""
    return int(random_words(key, OFFSET, 0, 1)[0]) * total >> 64


def multinomial_points(positions: Ints, total: int, key: tuple[int, int]) -> Ints:
    """Return an independent uniform point of [0, total) for every position: (K,) int64.

    Args:
        positions: (K,) int64, rising.
        total: below 2^63.
        key: (seed, epoch).
    """
    first, last = int(positions[0]), int(positions[-1])
    words = random_words(key, POINTS, first, last - first + 1)
    return multiply_high(words[positions - first], total).astype(np.int64)


def gumbel_top_k(weights: NDArray[np.floating], count: int, key: tuple[int, int]) -> Ints:
    """Return `count` distinct samples drawn ∝ weight without replacement, rising: int64.

    Gumbel-top-k (Vieira, 2014): those with the largest log(weight) + Gumbel noise are as if
    drawn one by one. The noise is made twice, first for the threshold, to be held only once.

    Args:
        weights: (N,) float32 or float64, >= 0, at least `count` of them positive.
        count: samples to draw.
        key: (seed, epoch).
    """
    ranks = np.empty(len(weights))
    for start, part in _gumbel_ranks(weights, key):
        ranks[start : start + len(part)] = part
    ranks.partition(count - 1)
    last = ranks[count - 1]
    del ranks
    chosen = [start + np.flatnonzero(part <= last) for start, part in _gumbel_ranks(weights, key)]
    return np.concatenate(chosen)[:count]


def _gumbel_ranks(
    weights: NDArray[np.floating], key: tuple[int, int]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield −(log(weight) + Gumbel noise) in chunks with their start: smallest is drawn first."""
    start = 0
    for chunk in chunks(weights):
        words = random_words(key, NOISE, start, len(chunk))
        uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        with np.errstate(divide="ignore"):  # a weight of 0 is never reached
            yield start, np.log(-np.log(uniform)) - np.log(chunk)
        start += len(chunk)


def chunks(weights: NDArray[np.floating]) -> Iterator[NDArray[np.float64]]:
    """Yield the weights as float64 copies of a bounded size."""
    for start in range(0, len(weights), _CHUNK):
        yield np.array(weights[start : start + _CHUNK], dtype=np.float64)


def sum_of(weights: NDArray[np.floating]) -> float:
    """Return the sum of the weights in float64."""
    with np.errstate(over="ignore"):
        return sum(float(chunk.sum()) for chunk in chunks(weights))
