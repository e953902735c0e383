from dataclasses import replace

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from flowdata.scoring.plan import packs
from flowdata.scoring.plan.packs import PlanOptions, plan_fixed, plan_padded

lengths_lists = st.lists(st.integers(0, 50), min_size=1, max_size=60)


@given(lengths_lists, st.integers(1, 120), st.none() | st.integers(1, 7))
def test_every_sample_is_in_one_pack_within_the_budget(lengths, max_tokens, batch_size):
    plan = plan_padded(torch.tensor(lengths), max_tokens=max_tokens, batch_size=batch_size)
    packs = [plan.pack(index).tolist() for index in range(len(plan))]
    assert sorted(index for pack in packs for index in pack) == list(range(len(lengths)))
    assert plan.sizes.tolist() == [len(pack) for pack in packs]
    for pack, amount in zip(packs, plan.amounts.tolist(), strict=True):
        assert amount == sum(lengths[i] for i in pack)
        padded = len(pack) * max(1, *(lengths[i] for i in pack), 1)
        assert padded <= max_tokens or len(pack) == 1
        assert batch_size is None or len(pack) <= batch_size


@given(lengths_lists)
def test_longest_samples_come_first(lengths):
    plan = plan_padded(torch.tensor(lengths), max_tokens=64)
    ordered = [lengths[i] for i in plan.order.tolist()]
    assert [max(1, each) for each in ordered] == sorted([max(1, n) for n in lengths], reverse=True)


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
    assert plan.sizes.tolist() == plan.amounts.tolist() == expected


def test_a_million_samples_take_a_few_bytes_each():
    lengths = torch.randint(1, 3000, (1_000_000,), generator=torch.Generator().manual_seed(0))
    plan = plan_padded(lengths, max_tokens=4096)
    assert torch.equal(plan.order.sort().values, torch.arange(len(lengths)))
    assert (lengths[plan.order].diff() <= 0).all()
    kept = sum(t.nbytes for t in (plan.order, plan.offsets, plan.amounts))
    assert kept / len(lengths) < 20
    padded = (lengths[plan.order[plan.offsets[:-1]]] * plan.sizes).sum()
    assert lengths.sum() / padded > 0.99  # hardly any padding


def test_order_is_the_same_whatever_the_longest():
    lengths = torch.randint(1, 99, (500,), generator=torch.Generator().manual_seed(0))
    plain = plan_padded(lengths, max_tokens=512)
    for longest in (300, 70_000):  # keys of one, two and four bytes
        plan = plan_padded(torch.cat([torch.tensor([longest]), lengths]), max_tokens=512)
        assert torch.equal(plan.order[1:] - 1, plain.order)


def test_groups_stay_together_as_long_as_their_longest():
    generator = torch.Generator().manual_seed(0)
    lengths = torch.randint(1, 99, (300,), generator=generator)
    groups = torch.randint(0, 60, (300,), generator=generator)
    plan = plan_padded(lengths, max_tokens=500, groups=groups)
    assert plan.order.sort().values.tolist() == list(range(300))
    ordered = groups[plan.order]
    assert len(ordered.unique_consecutive()) == len(groups.unique())
    longest = [int(lengths[groups == group].max()) for group in ordered.unique_consecutive()]
    assert longest == sorted(longest, reverse=True)
    for pack in map(plan.pack, range(len(plan))):
        assert int(lengths[pack].max()) * len(pack) <= max(500, int(lengths.max()))


def test_a_manifest_keeps_the_options_and_what_was_made_of_them():
    """Keys and values as stores on disk have them: another key is another plan, and is refused."""
    plan = plan_padded(torch.tensor([2, 9, 3, 4]), max_tokens=9)
    plan = replace(plan, options=PlanOptions(9, None, prefix=8, compile=True, threads=2))
    assert plan.to_manifest() == {
        "max_tokens": 9,
        "batch_size": None,
        "prefix": 8,
        "shared_prompts": 0,
        "compile": True,
        "threads": 2,
        "attention_by_products": False,
        "packs": 3,
        "digest": "1be2b99531d0572097c02df861b58df6ce129937eb241d00707188af9e21ba77",
    }


def test_a_begun_stores_options_go_before_a_calls_own():
    options = PlanOptions(max_tokens=9, batch_size=4, prefix=8, compile=True, threads=2)
    begun = {"max_tokens": None, "batch_size": 5, "threads": 3, "packs": 7, "digest": "ab"}
    assert options.as_begun(begun) == replace(options, max_tokens=None, batch_size=5, threads=3)
    assert options.as_begun({}) == options


@given(
    lengths=st.lists(st.integers(0, 40), min_size=1, max_size=60),
    saved=st.integers(0, 9),
    at_once=st.integers(1, 20),
)
def test_samples_are_sorted_part_by_part_as_all_at_once(lengths, saved, at_once):
    sizes = [max(length - saved, 1) for length in lengths]
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(packs, "_AT_ONCE", at_once)
        plan = plan_padded(torch.tensor(lengths), max_tokens=64, saved=saved)
    assert plan.amounts.tolist() == [
        sum(lengths[i] for i in plan.pack(index).tolist()) for index in range(len(plan))
    ]
    assert plan.order.tolist() == sorted(range(len(sizes)), key=lambda index: -sizes[index])
