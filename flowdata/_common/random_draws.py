"""Random draws as pure functions of (seed, epoch, position): nothing here has a state to save.

Weights become integers before they are summed. Integer sums are exact, so that a draw depends
neither on the order of the summation nor on the machine nor on the positions drawn before.

Systematic resampling goes from a position of an epoch to the sample drawn there in three steps.
Multinomial resampling replaces the first two: it takes a random point for every position::

    position ──→ stratum ──→ point ──→ sample
             │           │         └ CumulativeWeights.find
             │           └ systematic_points
             └ KeyedPermutation
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.int64]
Words = NDArray[np.uint64]

PERMUTATION, OFFSET, POINTS, NOISE, ACCEPTANCE = range(5)  # the purposes of streams of words
_TOTAL_BITS = 62  # the sum of the integer weights is just below 2^62, so that it fits an int64
_CHUNK = 1 << 18  # the number of weights converted to float64 at a time: 2 MiB


def random_words(key: tuple[int, int], purpose: int, start: int, count: int) -> Words:
    """Return words `start` … `start + count` of a stream of random bits: (count,) uint64.

    Source: Philox4x64-10, the counter-based generator of Salmon et al., SC 2011. A block of four
    words is a hash of its number, so that any word costs as much as the first.

    Args:
        key: (seed, epoch), each below 2^64.
        purpose: one of the constants above; streams of different purposes are independent.
        start: first word, >= 0.
        count: number of words.
    """
    # Philox takes a counter of four digits of 64 bits. The block's number is the lowest, the
    # purpose the highest, so that no two streams of a key overlap.
    block, skip = divmod(start, 4)
    counter = np.array([block, 0, 0, purpose], dtype=np.uint64)
    philox = np.random.Philox(counter=counter, key=np.array(key, dtype=np.uint64))
    words: Words = philox.random_raw(skip + count)
    return words[skip:]


def multiply_high(words: Words, factor: int) -> Words:
    """Return floor(words · factor / 2^64) exactly, for a factor below 2^63.

    NumPy has no integers of 128 bits, so the product is made of halves of 32 bits, digit by digit
    as in multiplication on paper::

           2^64         2^32          1
                                  low·f_low
                     high·f_low             + what low·f_low carries = middle
                     low·f_high             + middle's lower half    = carry
        high·f_high                         + what middle and carry carry = the result
    """
    low_half, half = np.uint64(0xFFFFFFFF), np.uint64(32)  # `>> half` gives the carry
    high, low = words >> half, words & low_half
    factor_high, factor_low = np.uint64(factor >> 32), np.uint64(factor & 0xFFFFFFFF)
    middle = high * factor_low + (low * factor_low >> half)
    carry = low * factor_high + (middle & low_half)
    result: Words = high * factor_high + (middle >> half) + (carry >> half)
    return result


class KeyedPermutation:
    """A permutation of 0 … size − 1 whose value at any position costs the same.

    A shuffled list would take 8 bytes a sample on every rank. This permutation takes a few rounds
    of two tables each, with about √size entries a table.

    Source: a Feistel network over a grid (Black and Rogaway, CT-RSA 2002). Position p is the cell
    in row p // columns and column p % columns. One half of a round shifts the row by a random
    function of the column, the other half shifts the column by one of the row::

        (row, column) ──→ (row + f(column), column) ──→ (row', column + g(row')) ──→ …

    Each half can be undone, because the coordinate that its shift depends on does not change. So a
    round never takes two cells to the same one, whatever f and g are. With √size rows and columns,
    f and g are small tables of random numbers.

    The grid has up to √size cells more than there are values. A position that lands on such a cell
    goes through the network again until it lands on a value (cycle walking). Its cycle began at a
    value, so it comes back to one, and different positions come to different values.
    """

    def __init__(self, size: int, key: tuple[int, int]) -> None:
        self.size = size
        self.rows = math.isqrt(size - 1) + 1
        self.columns = -(-size // self.rows)
        # A small grid mixes less in a round and gets more of them. With these numbers of rounds no
        # order of 6 values is 1 % likelier than another.
        rounds = max(3, 12 - size.bit_length() // 2)
        sides = np.array([self.rows, self.columns] * rounds)[:, None]
        words = random_words(key, PERMUTATION, 0, len(sides) * self.rows).reshape(len(sides), -1)
        # Shifts lie in [−side, 0). A row or column can then leave the grid at one end alone, where
        # it is negative, and adding the side brings it back.
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
            # An int64 shifted by 63 bits is all ones if it is negative, and all zeros if not, so
            # that `&` adds the side to negative rows alone: a modulo without division or branch.
            row += self.rows & (row >> 63)
            column += column_shifts.take(row)
            column += self.columns & (column >> 63)
        result: Ints = row * self.columns + column
        return result


class CumulativeWeights:
    """Weights as integers, laid end to end on a line, to find the sample at a point of the line.

    Weights are scaled by a power of two and rounded, so that their sum is just below 2^62::

        sample     0          1       2         3
              ├─────────┼───────────┼───┼─────────────────┤
              0         ends[0]   ends[1] ends[2]       total
                              ↑ a point here falls on sample 1

    A binary search of the ends would miss the cache about log2(N) times a point. A table of
    guides (Chen and Asau, 1974) makes it a step or two: it cuts the line into N / 2 to N equal
    buckets and has, for each of them, the first sample that can lie in it.

    Args:
        weights: (N,) float32 or float64, finite, >= 0, not all zero; read once, in chunks.
    """

    def __init__(self, weights: NDArray[np.floating]) -> None:
        self._ends = np.empty(len(weights), dtype=np.int64)  # where each sample's share ends
        exponent = _TOTAL_BITS - math.ceil(math.log2(sum_of(weights)))
        # guide[b] is the number of samples that end at or before the start of bucket b, so that no
        # point of the bucket lies on any of them. The width of a bucket is a power of two, so that
        # a shift gives a point's bucket.
        bits = (len(weights) // 2).bit_length()
        self._shift = _TOTAL_BITS - bits
        self._guide = np.zeros(2**bits + 2, dtype=np.min_scalar_type(-len(weights) - 1))
        self.total = start = 0
        for chunk in chunks(weights):
            ends = self._ends[start : start + len(chunk)]
            np.cumsum(np.rint(np.ldexp(chunk, exponent)).astype(np.int64), out=ends)
            ends += self.total
            # Each sample is counted at the first bucket that starts at or after its end. The sum
            # over buckets, below, then counts it at every later bucket as well.
            bucket = (ends + ((1 << self._shift) - 1)) >> self._shift
            counts = np.bincount(bucket - bucket[0])
            self._guide[bucket[0] : bucket[0] + len(counts)] += counts.astype(self._guide.dtype)
            self.total = int(ends[-1])
            start += len(chunk)
        np.cumsum(self._guide, dtype=self._guide.dtype, out=self._guide)

    def find(self, points: Ints) -> Ints:
        """Return the sample that each point of [0, total) falls on: (K,) int64."""
        bucket = points >> self._shift
        samples = self._guide.take(bucket).astype(np.int64)
        # A binary search of all points at once, from the guide on: it skips 2^bit samples wherever
        # the last of them ends at or before the point. The bucket with the most samples tells how
        # large the first step has to be.
        widest = int((self._guide.take(bucket + 1) - samples).max(initial=0))
        for bit in reversed(range(widest.bit_length())):
            step = 1 << bit
            last_skipped = self._ends.take(samples + (step - 1), mode="clip")
            samples += (last_skipped <= points) * step
        return samples


def systematic_points(strata: Ints, total: int, num_samples: int, offset: int) -> Ints:
    """Return the point floor((stratum · total + offset) / num_samples) of every stratum, exactly.

    Source: systematic resampling (Kitagawa, 1996). All strata have the same offset, so that points
    lie as evenly as the teeth of a comb. A share s of the total therefore gets num_samples · s
    points, to within one::

        0                                                   total
        ├───•────────┼───•────────┼───•────────┼───•────────┤
        └───┘ the offset over num_samples, in every stratum

    Args:
        strata: (K,) int64 in [0, num_samples), with num_samples below 2^31.
        total: below 2^63.
        num_samples: number of equal strata that the total is cut into.
        offset: in [0, total), from `systematic_offset`.
    """
    # stratum · total would overflow an int64. With quotients and remainders by num_samples the
    # point is the same, and the largest product is of a stratum and a remainder, both below 2^31.
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
    """Return `count` different samples drawn ∝ weight without replacement, rising: int64.

    Source: Gumbel-top-k (Vieira, 2014). log(weight) + Gumbel noise is largest for sample i with
    probability w_i / Σw; without that sample the same holds for the others. So the `count` samples
    with the largest sums are distributed as if they were drawn one by one.

    Args:
        weights: (N,) float32 or float64, >= 0, at least `count` of them positive.
        count: samples to draw.
        key: (seed, epoch).
    """
    # The partition gives the threshold but mixes the keys, so a second pass looks for the samples
    # whose keys lie up to it. It makes the noise again, because a second copy of the keys would
    # take 8 bytes a sample.
    keys = np.empty(len(weights))
    for start, part in _gumbel_keys(weights, key):
        keys[start : start + len(part)] = part
    keys.partition(count - 1)
    threshold = keys[count - 1]
    del keys
    samples = [
        start + np.flatnonzero(part <= threshold) for start, part in _gumbel_keys(weights, key)
    ]
    return np.concatenate(samples)[:count]


def _gumbel_keys(
    weights: NDArray[np.floating], key: tuple[int, int]
) -> Iterator[tuple[int, NDArray[np.float64]]]:
    """Yield the start of a chunk with its −(log(weight) + noise): the smallest is drawn first.

    Gumbel noise is −log(−log(u)) of a uniform u.
    """
    start = 0
    for chunk in chunks(weights):
        words = random_words(key, NOISE, start, len(chunk))
        # A half is added to the 52 bits, so that u is never 0 or 1 and the logarithms are finite.
        uniform = ((words >> np.uint64(12)).astype(np.float64) + 0.5) * 2.0**-52
        with np.errstate(divide="ignore"):  # a weight of 0 gives infinity, which is drawn last
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
