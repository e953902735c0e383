"""Equal learning: fronts, draws and corrections, against slow versions and known answers."""

import math

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays

from flowdata.study import packed, report
from flowdata.study.equal_learning import (
    SHARES,
    Items,
    items_of,
    kept_at_equal_learning,
    old_at,
    runs_with_items,
)

START, STANDARD = "probe", "standard"


def hit(share, count=400):
    """Items of which a share, in %, is right."""
    return np.where(np.arange(count) < share / 100 * count, 100.0, 0.0)


def runs(points, seeds=(0, 1, 2)):
    """{(method, rate): (new, old)} on each seed."""
    return {key: {seed: Items(*map(hit, pair)) for seed in seeds} for key, pair in points.items()}


POINTS = {
    (START, 0.0): (60, 80),
    (STANDARD, 0.01): (70, 70),
    (STANDARD, 0.1): (80, 40),
    ("better", 0.01): (70, 75),
    ("better", 0.1): (80, 60),
    ("slow", 0.01): (65, 75),
}


def test_a_reference_without_others_keeps_what_it_keeps():
    points = {key: value for key, value in POINTS.items() if key[0] in (START, STANDARD)}
    (standard,) = kept_at_equal_learning(runs(points), STANDARD, START, draws=50)
    assert standard.at == pytest.approx((70, 55, 46, 40))
    assert (standard.difference, standard.low, standard.high, standard.p) == (0, 0, 0, 1)


def test_what_is_kept_is_read_off_the_fronts():
    standard, better, slow = kept_at_equal_learning(runs(POINTS), STANDARD, START, draws=50)
    assert (standard.method, better.method, slow.method) == (STANDARD, "better", "slow")
    assert standard.at == pytest.approx((70, 55, 46, 40))  # new of 70, 75, 78, 80
    assert better.at == pytest.approx((75, 67.5, 63, 60))
    assert np.isnan(slow.at).all()  # it learns 65 at most
    assert standard.difference == standard.low == standard.high == 0
    # Between 60 and 65 both lie on one line; beyond it slow has nothing to show.
    assert slow.difference == pytest.approx(0)
    levels = np.linspace(60, 80, 21)
    ours = np.interp(levels, [60, 70, 80], [80, 75, 60])
    theirs = np.interp(levels, [60, 70, 80], [80, 70, 40])
    assert better.difference == pytest.approx((ours - theirs).mean())
    assert better.low <= better.difference <= better.high
    assert (better.rates, better.seeds, slow.rates) == (2, 3, 1)


def test_what_the_reference_learned_itself_is_reached_whatever_is_rounded():
    generator = np.random.default_rng(0)
    for _ in range(200):
        first, last = generator.integers(80, 350, 3), generator.integers(700, 950, 3)
        points = {(START, 0.0): (first, 80), (STANDARD, 0.1): (last, 40)}
        of_seeds = {
            key: {seed: Items(hit(new[seed] / 10, 1000), hit(old)) for seed in range(3)}
            for key, (new, old) in points.items()
        }
        (standard,) = kept_at_equal_learning(of_seeds, STANDARD, START, draws=1)
        assert standard.at[-1] == pytest.approx(40)


def test_a_smaller_step_alone_gains_nothing():
    # The same front, walked at half the rate: it keeps more at every rate, not at equal learning.
    points = {
        (START, 0.0): (60, 80),
        **{(STANDARD, rate): (60 + 200 * rate, 80 - 400 * rate) for rate in (0.02, 0.04, 0.08)},
        **{("slower", 2 * rate): (60 + 200 * rate, 80 - 400 * rate) for rate in (0.02, 0.04)},
    }
    slower = kept_at_equal_learning(runs(points), STANDARD, START, draws=200)[1]
    assert slower.difference == pytest.approx(0)
    assert slower.p > 0.5


def test_the_interval_holds_what_items_and_seeds_leave_open():
    generator = np.random.default_rng(0)

    def noisy(new, old, seeds, items):
        return {
            seed: Items(*(100.0 * (generator.random(items) < p / 100) for p in (new, old)))
            for seed in seeds
        }

    def width(seeds, items):
        all_runs = {key: noisy(*pair, seeds, items) for key, pair in POINTS.items()}
        kept = kept_at_equal_learning(all_runs, STANDARD, START, draws=300)[1]
        return kept.high - kept.low

    assert width(range(5), 2000) < 0.6 * width(range(5), 200)  # √10 times fewer items
    different = {key: noisy(*pair, range(4), 3000) for key, pair in POINTS.items()}
    better = kept_at_equal_learning(different, STANDARD, START)[1]
    assert better.low > 0
    assert better.p < 0.01


def test_items_that_all_seeds_share_are_few_for_all_of_them():
    generator = np.random.default_rng(1)
    once = {
        key: Items(*(100.0 * (generator.random(300) < share / 100) for share in pair))
        for key, pair in POINTS.items()
    }

    def width(seeds):
        all_runs = {key: dict.fromkeys(range(seeds), items) for key, items in once.items()}
        kept = kept_at_equal_learning(all_runs, STANDARD, START)[1]
        return kept.high - kept.low

    # Eight times the same answers tell no more than they tell once.
    assert width(8) == pytest.approx(width(1), rel=0.1)


def test_p_values_are_corrected_for_their_number():
    same = {key: pair for key, pair in POINTS.items() if key[0] in (START, STANDARD, "better")}
    alone = kept_at_equal_learning(runs(same), STANDARD, START, draws=99)[1].p
    for number in range(4):
        same |= {(f"copy {number}", rate): POINTS["better", rate] for rate in (0.01, 0.1)}
    among_five = kept_at_equal_learning(runs(same), STANDARD, START, draws=99)
    assert [kept.p for kept in among_five[1:]] == pytest.approx([5 * alone] * 5)


@settings(deadline=None)
@given(arrays(float, st.tuples(st.integers(1, 6), st.just(2)), elements=st.integers(0, 20)))
def test_a_front_is_the_best_of_what_learns_as_much(points):
    levels = np.linspace(0, 20, 9)
    for level, old in zip(levels, old_at(levels, points), strict=True):
        as_good = points[points[:, 0] >= level]
        if not len(as_good):
            assert np.isnan(old)
            continue
        assert old >= as_good[:, 1].max() - 1e-9  # a line between two rates may lie above
        assert old <= points[:, 1].max() + 1e-9


def test_runs_of_a_head_task_give_their_items():
    new, old = torch.rand(77) > 0.4, torch.rand(1000) > 0.2
    record = {
        "target": {"accuracy": 100 * new.double().mean().item()},
        "retained": {"CIFAR-10 accuracy": 100 * old.double().mean().item()},
        "hits": {"target": packed(new), "retained": packed(old)},
    }
    items = items_of(record)
    assert np.array_equal(items.new, 100.0 * new.numpy())
    assert np.array_equal(items.old, 100.0 * old.numpy())
    record["hits"]["target"], record["target"]["accuracy"] = packed(new & ~new), 0.0
    assert items_of(record).new.mean() == 0


def record(key, seed):
    answers = [torch.from_numpy(hit(share)).bool() for share in POINTS[key]]
    new, old = (100 * each.double().mean().item() for each in answers)
    return {
        **dict(zip(("method", "rate", "seed"), (*key, seed), strict=True)),
        "target": {"accuracy": new},
        "retained": {"old accuracy": old},
        "validation": new,
        "hits": dict(zip(("target", "retained"), map(packed, answers), strict=True)),
    }


def test_the_page_has_a_table_of_the_seeds_that_are_whole():
    points = [(key if key[0] != START else ("linear probe", 0.0), key) for key in POINTS]
    records = [record(key, seed) | {"method": name[0]} for seed in range(2) for name, key in points]
    one_more = [record((STANDARD, 0.01), 2)]
    page = report({}, records + one_more)
    assert "At equal learning (2 seeds)" in page
    assert "| standard | 2 | 70.0 | 55.0 | 46.0 | 40.0 |  |  |" in page
    assert "| better | 2 | 75.0 | 67.5 | 63.0 | 60.0 | +7." in page
    assert "| slow | 1 | – | – | – | – |" in page
    assert "At equal learning" not in report({}, records[1:6])


def test_a_run_without_a_right_answer_has_as_many_items_as_others():
    """2,001 items fill no whole bytes, so that the hits alone don't tell how many there are."""
    right = torch.arange(2001) < 1200
    records = []
    for name, rate, old in [("linear probe", 0.0, right), (STANDARD, 0.1, right & False)]:
        run = record((STANDARD, 0.01), 0) | {"method": name, "rate": rate}
        run["hits"] = run["hits"] | {"retained": packed(old)}
        run["retained"] = {"old accuracy": 100 * old.double().mean().item()}
        records.append(run)
    assert "| standard | 1 | 60.0 |" in report({}, records)  # of an older version
    both = runs_with_items(records)
    assert [len(of_seed[0].old) for of_seed in both.values()] == [2001, 2001]
    records[1]["items"] = {"target": 400, "retained": 2001}
    assert len(items_of(records[1]).old) == 2001
    records[1]["retained"] = {"old accuracy": math.nan}
    assert items_of(records[1]).old.sum() == 0


def test_what_fronts_need_is_asked_for():
    with pytest.raises(ValueError, match="no 'probe'"):
        kept_at_equal_learning({(STANDARD, 0.1): {0: Items(hit(1), hit(1))}}, STANDARD, START)
    apart = {(START, 0.0): {0: Items(hit(1), hit(1))}, (STANDARD, 0.1): {1: Items(hit(1), hit(1))}}
    with pytest.raises(ValueError, match="no seed"):
        kept_at_equal_learning(apart, STANDARD, START)
    assert len(SHARES) == 4


@pytest.mark.parametrize(
    ("items", "message"),
    [
        (Items(hit(50, 300), hit(50)), "300 items of the new task, where another run of the seed"),
        (Items(hit(50), hit(50) * np.nan), "items of the old task are not finite"),
        (Items(np.full(400, np.inf), hit(50)), "items of the new task are not finite"),
    ],
)
def test_items_that_can_not_be_compared_are_refused(items, message):
    spoilt = runs(POINTS) | {("better", 0.01): {0: items, 1: items, 2: items}}
    with pytest.raises(ValueError, match=message):
        kept_at_equal_learning(spoilt, STANDARD, START, draws=5)
