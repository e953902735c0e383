import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdata.streaming.running_median import RELATIVE_ERROR, RunningMedian
from tests import reference


def sketch_of(*parts):
    running = RunningMedian()
    for part in parts:
        running.update(torch.as_tensor(part))
    return running


@given(st.lists(st.one_of(st.just(0.0), st.floats(1e-12, 1e12)), min_size=1, max_size=200))
def test_the_median_is_within_the_stated_error(values):
    exact = reference.median(values)
    median = sketch_of(torch.tensor(values, dtype=torch.float64)).median()
    assert median == pytest.approx(exact, rel=RELATIVE_ERROR * (1 + 1e-6), abs=0)


def test_parts_in_any_order_and_merged_give_the_sketch_of_the_whole():
    values = np.random.default_rng(0).lognormal(sigma=3, size=10_000)
    whole = sketch_of(values)
    assert sketch_of(*np.split(values[::-1].copy(), 10)).counts == whole.counts
    total = sketch_of(values[:3_000]) + sketch_of(values[3_000:])
    assert total.counts == whole.counts
    assert RunningMedian(dict(whole.counts)).median() == whole.median()


def test_memory_does_not_grow_with_the_number_of_values():
    running = RunningMedian()
    generator = torch.Generator().manual_seed(0)
    values = torch.rand(20, 20_000, generator=generator) * 9 + 1
    for part in values:
        running.update(part)
    assert len(running.counts) < 1_200
    assert running.median() == pytest.approx(values.flatten().quantile(0.5).item(), rel=1e-3)


def test_nothing_counted_has_no_median():
    with pytest.raises(ValueError, match="no value has been counted yet"):
        RunningMedian().median()
