"""Equal learning: what each method keeps of the old where it has learned as much of the new.

At one learning rate a method that learns less also forgets less, so that a comparison there says
nothing. Over its rates a method traces a front of (new, old), and all fronts begin where nothing is
forgotten: at the linear probe, which no step has moved.

    old  P──╮                  P  the linear probe
             ╲    ╲ A          at each level of the new, between P and what the reference learns
              B    ╲           at most, A keeps more than B; where a front does not reach, a
                 ╲  ╲          method has nothing to show
         └──────────────  new

Between two rates a front is a straight line. What seeds and test items leave open is told by
drawing both anew, with replacement (Efron, 1979): the same items for all methods, and for all seeds
that have as many. Seeds that share their test items, as is usual, have no more of them together
than one has; for others, drawing by place changes nothing. The p values of several methods are
corrected for their number (Holm, 1979).
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import NamedTuple, TypeAlias

import numpy as np

from flowdata.study.hits import unpacked
from flowdata.study.records import KINDS, Record

SHARES = (0.5, 0.75, 0.9, 1.0)  # of what the reference learns over the probe
_LEVELS = np.linspace(0, 1, 21)  # at which differences are averaged
_DRAWS = 1000
_INTERVAL = (2.5, 97.5)  # percentiles

_Floats: TypeAlias = "np.ndarray[tuple[int, ...], np.dtype[np.float64]]"


class Items(NamedTuple):
    """What a run scores on each test item, more for better.

    Attributes:
        new: (N,) of the new task.
        old: (M,) of the old one.
    """

    new: _Floats
    old: _Floats


# By method and rate, then by seed.
ItemsOfRuns: TypeAlias = Mapping[tuple[str, float], Mapping[int, Items]]


@dataclass(frozen=True)
class Difference:
    """A method's score less that of the reference.

    Attributes:
        difference: of the means over seeds and items.
        low: end of the interval in which 95 % of the draws' differences lie.
        high: its other end.
        p: two-sided, of no difference, corrected for the number of methods.
    """

    difference: float
    low: float
    high: float
    p: float


@dataclass(frozen=True)
class Kept(Difference):
    """What a method keeps of the old at equal learning, beside the reference.

    The difference is that of the old scores, the mean over the levels that both reach.

    Attributes:
        method: its name.
        rates: at how many rates it was run.
        seeds: on how many seeds each.
        at: the old score at each of `SHARES`, NaN where the method does not learn as much.
    """

    method: str
    rates: int
    seeds: int
    at: tuple[float, ...]


def runs_with_items(records: Iterable[Record]) -> dict[tuple[str, float], dict[int, Items]]:
    """Return the items of runs of `HeadTask`, as `kept_at_equal_learning` takes them."""
    records = list(records)
    counts: dict[int, dict[str, int]] = {}  # of items, which all runs of a seed share
    for record in records:
        counts.setdefault(record["seed"], {}).update(_counts_of(record))
    runs: dict[tuple[str, float], dict[int, Items]] = {}
    for record in records:
        items = _items(record, counts[record["seed"]] | _counts_of(record))
        runs.setdefault((record["method"], record["rate"]), {})[record["seed"]] = items
    return runs


def items_of(record: Record) -> Items:
    """Return the right answers of a run of `HeadTask`, in % each: 0 or 100."""
    return _items(record, _counts_of(record))


def _items(record: Record, counts: Mapping[str, int]) -> Items:
    return Items(*(100.0 * _bits(record, kind)[: counts.get(kind)] for kind in KINDS))


def _counts_of(record: Record) -> dict[str, int]:
    """How many items each task has, as far as a run tells.

    A run of an older version has no ``items``. There an accuracy tells, unless it is 0.
    """
    if "items" in record:
        return dict(record["items"])
    counts = {}
    for kind in KINDS:
        (accuracy,) = record[kind].values()
        if accuracy > 0:  # NaN, of what diverged, is not
            counts[kind] = round(100 * int(_bits(record, kind).sum()) / accuracy)
    return counts


def _bits(record: Record, kind: str) -> _Floats:
    """A run's right answers, 1 or 0, filled up to whole bytes."""
    return unpacked(record["hits"][kind]).numpy().astype(np.float64)


def kept_at_equal_learning(
    runs: ItemsOfRuns, reference: str, start: str, *, draws: int = _DRAWS, seed: int = 0
) -> list[Kept]:
    """Return what each method keeps at equal learning, the reference first.

    Args:
        runs: items by method and rate, then by seed; only seeds that all of them have count.
        reference: the method that others are compared with.
        start: the method that all fronts begin with, at a single rate.
        draws: number of draws of seeds and items.
        seed: of the draws.

    Raises:
        ValueError: reference or start is missing, no seed is in all runs, or the items of a seed
            are not as many in all runs, or not finite.
    """
    rates = Counter(method for method, _ in runs)
    for name in (reference, start):
        if name not in rates:
            raise ValueError(
                f"runs have no {name!r}, which all fronts need: run it, or name another method"
            )
    seeds = _shared_seeds(runs)
    methods = [reference, *(m for m in rates if m not in (reference, start))]
    places = [[i for i, (m, _) in enumerate(runs) if m in (method, start)] for method in methods]
    scores = _drawn_scores(runs, seeds, draws, seed)
    start_place = next(place for place, (method, _) in enumerate(runs) if method == start)
    old = np.array([_old_at_all(each, places, start_place) for each in scores])
    at, over_levels = old[:, :, : len(SHARES)], old[:, :, len(SHARES) :]
    # Every front reaches the first level; beyond its end there is nothing to compare.
    differences = np.nanmean(over_levels - over_levels[:, :1], axis=-1)
    of_methods = [Difference(0.0, 0.0, 0.0, 1.0), *_differences_of(differences[:, 1:])]
    return [
        Kept(
            **vars(of_method),
            method=method,
            rates=rates[method],
            seeds=len(seeds),
            at=tuple(levels.tolist()),
        )
        for of_method, method, levels in zip(of_methods, methods, at[0], strict=True)
    ]


def differences(
    runs: ItemsOfRuns, reference: str, *, draws: int = _DRAWS, seed: int = 0
) -> dict[str, tuple[Difference, Difference]]:
    """Return how much each method differs from the reference as it is, on the new and on the old.

    Args:
        runs: items by method and rate, then by seed; every method at a single rate.
        reference: the method that others are compared with.
        draws: number of draws of seeds and items.
        seed: of the draws.

    Raises:
        ValueError: a method has several rates, the reference is missing, or see
            `kept_at_equal_learning`.
    """
    methods = [method for method, _ in runs]
    if len(set(methods)) < len(methods):
        raise ValueError("runs have several rates of a method: compare them at equal learning")
    if reference not in methods:
        raise ValueError(f"runs have no {reference!r}: run it, or name another reference")
    scores = _drawn_scores(runs, _shared_seeds(runs), draws, seed)
    off = scores - scores[:, [methods.index(reference)]]
    others = [place for place, method in enumerate(methods) if method != reference]
    new, old = (_differences_of(off[:, others, kind]) for kind in range(2))
    pairs = zip(new, old, strict=True)
    return {methods[place]: pair for place, pair in zip(others, pairs, strict=True)}


def _differences_of(drawn: _Floats) -> list[Difference]:
    """Those of several methods, from what they are, first, and as drawn: (1 + draws, methods)."""
    if not drawn.shape[1]:  # no percentiles are taken of nothing
        return []
    p_values = _corrected([_p(of_method) for of_method in drawn[1:].T])
    low, high = np.nanpercentile(drawn[1:], _INTERVAL, axis=0)
    columns = (drawn[0].tolist(), low.tolist(), high.tolist(), p_values)
    return [Difference(*values) for values in zip(*columns, strict=True)]


def _shared_seeds(runs: ItemsOfRuns) -> list[int]:
    """The seeds that all runs have, whose items have been checked."""
    seeds = sorted(set.intersection(*(set(of_seed) for of_seed in runs.values())))
    if not seeds:
        raise ValueError(
            "runs have no seed that all methods and rates were run on: run what is missing, or "
            "leave out the methods and rates that lack seeds"
        )
    _check_items(runs, seeds)
    return seeds


def _check_items(runs: ItemsOfRuns, seeds: Sequence[int]) -> None:
    """Raise ValueError for items that can't be compared on a seed, or are no numbers."""
    for seed in seeds:
        first = next(iter(runs.values()))[seed]
        for (method, rate), of_seed in runs.items():
            items = of_seed[seed]
            where = f"{method!r} at rate {rate:g}, seed {seed}"
            for kind, values, others in zip(Items._fields, items, first, strict=True):
                if len(values) != len(others) or not len(values):
                    raise ValueError(
                        f"{where}: {len(values)} items of the {kind} task, where another run of "
                        f"the seed has {len(others)}; score all runs on the same, one at least"
                    )
                if not np.isfinite(values).all():
                    raise ValueError(
                        f"{where}: items of the {kind} task are not finite; leave the run out, or "
                        "score what diverged as wrong"
                    )


def _drawn_scores(runs: ItemsOfRuns, seeds: Sequence[int], draws: int, seed: int) -> _Floats:
    """The runs' means over seeds and items, (1 + draws, runs, 2): as they are, then as drawn."""
    generator = np.random.default_rng(seed)
    counts = _counts(generator, draws, len(seeds)) / len(seeds)  # of each seed in each draw
    total = np.zeros((1 + draws, len(runs), 2))
    item_counts: dict[tuple[int, int], _Floats] = {}  # by kind and number of items
    for place, each in enumerate(seeds):
        items_of_runs = [of_seed[each] for of_seed in runs.values()]
        for kind, items in enumerate(map(np.stack, zip(*items_of_runs, strict=True))):
            size = items.shape[1]
            if (kind, size) not in item_counts:
                item_counts[kind, size] = _counts(generator, draws, size) / size
            total[:, :, kind] += counts[:, place, None] * (item_counts[kind, size] @ items.T)
    return total


def _counts(generator: np.random.Generator, draws: int, size: int) -> _Floats:
    """How often each of `size` things is drawn, (1 + draws, size): once each, then at random."""
    counts = generator.multinomial(size, np.full(size, 1 / size), size=draws)
    return np.concatenate([np.ones((1, size)), counts])


def _old_at_all(scores: _Floats, places: Sequence[Sequence[int]], start: int) -> list[_Floats]:
    """Each method's old score at all levels; the first method is the reference."""
    first, last = scores[start, 0], scores[places[0], 0].max()
    levels = first + (last - first) * np.concatenate([SHARES, _LEVELS])
    return [old_at(levels, scores[list(of_method)]) for of_method in places]


def old_at(levels: _Floats, points: _Floats) -> _Floats:
    """Return the old score that a front has at levels of the new, NaN beyond its end.

    Args:
        levels: (L,).
        points: (R, 2), new and old score of each rate.

    Example:
        >>> points = np.array([[60.0, 80.0], [80.0, 60.0], [70.0, 50.0]])
        >>> old_at(np.array([50.0, 70.0, 80.0, 81.0]), points)
        array([80., 70., 60., nan])
    """
    best_first = points[np.lexsort((-points[:, 1], -points[:, 0]))]  # by falling new
    highest_before = np.maximum.accumulate(np.concatenate([[-np.inf], best_first[:-1, 1]]))
    front = best_first[best_first[:, 1] > highest_before][::-1]
    end = front[-1, 0]  # which a level misses by the rounding of sums that are equal
    levels = np.where(np.isclose(levels, end, rtol=1e-12, atol=0), end, levels)
    old: _Floats = np.interp(levels, front[:, 0], front[:, 1], right=np.nan)
    return old


def _p(differences: _Floats) -> float:
    """Two-sided: how often draws lie on the rarer side of 0."""
    rarer = min((differences <= 0).sum(), (differences >= 0).sum())
    return min(1.0, 2 * (int(rarer) + 1) / (len(differences) + 1))


def _corrected(p_values: Sequence[float]) -> list[float]:
    """Holm's correction: the least p times their number, the next times one less, never falling."""
    order = np.argsort(p_values, kind="stable")
    corrected, highest = [0.0] * len(p_values), 0.0
    for rank, place in enumerate(order):
        highest = max(highest, min(1.0, (len(p_values) - rank) * p_values[place]))
        corrected[place] = highest
    return corrected
