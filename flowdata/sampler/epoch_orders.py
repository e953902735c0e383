"""The order of an epoch's draws, as a pure function of the position in it."""

from __future__ import annotations

import functools
import hashlib
from collections.abc import Callable
from typing import Any, Literal, TypeAlias

import numpy as np
from numpy.typing import NDArray

from flowdata._common.random_draws import (
    CumulativeWeights,
    Ints,
    KeyedPermutation,
    chunks,
    gumbel_top_k,
    multinomial_points,
    sum_of,
    systematic_offset,
    systematic_points,
)
from flowdata._common.resumable import is_integer

Algorithm: TypeAlias = Literal["systematic", "multinomial", "gumbel_top_k"]
EpochOrder: TypeAlias = Callable[[Ints], Ints]  # global positions to the samples drawn there

_VERSION = 1  # of the order and of a sampler's state; an order that changes needs another number


class EpochOrders:
    """Every epoch's order of samples drawn ∝ weight.

    An order depends on (weights, number of draws, algorithm, seed, epoch) alone, and a position
    can be drawn without the ones before it. Ranks therefore share an order without talking to each
    other, and a loop that resumes has nothing to draw again.

    Args:
        weights: (N,) float32 or float64, finite, >= 0; not copied.
        num_samples: draws of an epoch, between 1 and 2^31 − 1; without replacement at most the
            number of positive weights.
        algorithm: ``"systematic"`` or ``"multinomial"``, which draw with replacement, or
            ``"gumbel_top_k"``, which draws without.
        seed: in [0, 2^64).

    Raises:
        TypeError: `num_samples` is no integer.
        ValueError: `num_samples` is out of range, or the weights are all zero or overflow.

    Example:
        >>> orders = EpochOrders(np.array([1.0, 2.0, 3.0, 4.0]), 8, "systematic", seed=1)
        >>> orders.of_epoch(0)(np.arange(8)).tolist()
        [3, 2, 2, 3, 3, 1, 0, 1]
        >>> orders.of_epoch(0)(np.array([2, 6])).tolist()
        [2, 0]
    """

    def __init__(
        self, weights: NDArray[np.floating], num_samples: int, algorithm: Algorithm, seed: int
    ) -> None:
        _check_draws(weights, num_samples, algorithm)
        self.weights, self.num_samples = weights, int(num_samples)
        self.algorithm, self.seed = algorithm, seed
        # The sums are the same for every epoch; draws without replacement need none.
        self._table = None if algorithm == "gumbel_top_k" else CumulativeWeights(weights)

    def of_epoch(self, epoch: int) -> EpochOrder:
        """Return the epoch's order: a function from (K,) rising positions to (K,) samples."""
        key, count, table = (self.seed, epoch), self.num_samples, self._table
        if table is None:
            # The samples come in rising order, which would say nothing of chance: the permutation
            # shuffles them.
            samples, shuffle = gumbel_top_k(self.weights, count, key), KeyedPermutation(count, key)
            return lambda positions: samples[shuffle(positions)]
        if self.algorithm == "multinomial":
            return lambda positions: table.find(multinomial_points(positions, table.total, key))
        # Rising strata have rising points, which fall on rising samples: the permutation of the
        # strata shuffles them.
        strata, offset = KeyedPermutation(count, key), systematic_offset(table.total, key)
        return lambda positions: table.find(
            systematic_points(strata(positions), table.total, count, offset)
        )

    @functools.cached_property
    def identity(self) -> dict[str, Any]:
        """What an order depends on beside the epoch: equal identities have equal orders."""
        return {
            "version": _VERSION,
            "algorithm": self.algorithm,
            "seed": self.seed,
            "num_samples": self.num_samples,
            "weights": _digest(self.weights),
        }

    def expected_distinct(self) -> float:
        """Return how many different samples an epoch is expected to draw."""
        if self.algorithm == "gumbel_top_k":
            return float(self.num_samples)
        total = sum_of(self.weights)
        return sum(float(self._chances(chunk / total).sum()) for chunk in chunks(self.weights))

    def expected_repeats(self) -> float:
        """Return how often an epoch is expected to draw the heaviest sample."""
        if self.algorithm == "gumbel_top_k":
            return 1.0
        return self.num_samples * float(self.weights.max()) / sum_of(self.weights)

    def _chances(self, shares: NDArray[np.float64]) -> NDArray[np.float64]:
        """How likely a sample of this share of the total weight is to be drawn at least once."""
        if self.algorithm == "systematic":
            return np.minimum(shares * self.num_samples, 1)
        # 1 − (1 − share)^draws, by logarithms: a small share would be lost in 1 − share. A sample
        # that has all the weight takes the logarithm of 0, which gives a probability of 1.
        with np.errstate(divide="ignore"):
            chances: NDArray[np.float64] = -np.expm1(
                self.num_samples * np.log1p(-np.minimum(shares, 1))
            )
        return chances


def _check_draws(weights: NDArray[np.floating], num_samples: Any, algorithm: Algorithm) -> None:
    """Check that the weights allow so many draws."""
    total = sum_of(weights)
    if not 0 < total < float("inf"):
        raise ValueError(
            f"weights sum to {total:g}; "
            + ("scale them down" if total else "at least one must be positive")
        )
    if not is_integer(num_samples):
        raise TypeError(f"num_samples must be an integer, got {num_samples!r}")
    if not 0 < num_samples < 2**31:  # `systematic_points` multiplies two such numbers in an int64
        raise ValueError(f"num_samples must lie between 1 and 2^31 - 1, got {num_samples}")
    without_replacement = algorithm == "gumbel_top_k"
    if without_replacement and num_samples > (positive := np.count_nonzero(weights)):
        raise ValueError(
            f"num_samples is {num_samples}, but without replacement only the {positive} of "
            f"{len(weights)} samples with a positive weight can be drawn; ask for no more, or "
            "pass replacement=True"
        )


def _digest(weights: NDArray[np.floating]) -> str:
    """A hash of the weights as float64, so that float32 and float64 of the same value agree."""
    digest = hashlib.sha256()
    for chunk in chunks(weights):
        digest.update(chunk.data)
    return digest.hexdigest()
