import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdata.scoring.plan import plan_fixed, plan_padded

lengths_lists = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(lengths_lists, st.integers(1, 120), st.none() | st.integers(1, 7))
def test_every_sample_is_in_one_pack_within_the_budget(lengths, max_tokens, batch_size):
    plan = plan_padded(torch.tensor(lengths), max_tokens=max_tokens, batch_size=batch_size)
    packs = [plan.pack(index).tolist() for index in range(len(plan))]
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert plan.sizes.tolist() == [len(pack) for pack in packs]
    for pack, cost in zip(packs, plan.costs.tolist(), strict=True):
        padded = len(pack) * max(1, *(lengths[i] for i in pack), 1)
        assert cost == padded
        assert padded <= max_tokens or len(pack) == 1
        assert batch_size is None or len(pack) <= batch_size


@given(lengths_lists)
def test_longest_samples_come_first(lengths):
    plan = plan_padded(torch.tensor(lengths), max_tokens=64)
    ordered = [lengths[i] for i in plan.order.tolist()]
    assert ordered == sorted(lengths, reverse=True)


def test_plans_are_deterministic_and_their_digest_tells_them_apart():
    lengths = torch.randint(1, 99, (200,), generator=torch.Generator().manual_seed(0))
    plan = plan_padded(lengths, max_tokens=512)
    assert plan.digest == plan_padded(lengths.clone(), max_tokens=512).digest
    assert plan.digest != plan_padded(lengths, max_tokens=256).digest
    assert plan.digest != plan_padded(lengths.flip(0), max_tokens=512).digest


@pytest.mark.parametrize(("samples", "expected"), [(7, [3, 3, 1]), (6, [3, 3]), (1, [1])])
def test_samples_alike_in_size_stay_in_order(samples, expected):
    plan = plan_fixed(samples, batch_size=3)
    assert plan.order.tolist() == list(range(samples))
    assert plan.sizes.tolist() == plan.costs.tolist() == expected
