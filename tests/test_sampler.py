import math
import pickle
import re
import statistics
import warnings
from itertools import islice

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch.utils.data import ConcatDataset, DataLoader, DistributedSampler, TensorDataset
from torchdata.nodes import Batcher, Loader, ParallelMapper, SamplerWrapper
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata import LossScorer
from flowdata.dataset import FlowWeightedDataset
from flowdata.errors import ScoreMismatchError
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from tests import reference
from tests.plausible import chi_square_is_plausible

WEIGHTS = torch.rand(1000, generator=torch.Generator().manual_seed(0)) ** 3


def drawn(sampler):
    return np.fromiter(sampler, dtype=np.int64)


# Frequencies.


@pytest.mark.parametrize("count", [1_000, 1_000_000])
@pytest.mark.parametrize("factor", [0.3, 1, 2.7])
def test_systematic_counts_are_within_one_of_what_each_sample_deserves(count, factor):
    weights = np.random.default_rng(count).random(count) ** 4
    weights[::7] = 0
    num_samples = int(count * factor)
    counts = np.bincount(drawn(FlowSampler(weights, num_samples, seed=1)), minlength=count)
    deserved = num_samples * weights / weights.sum()
    assert counts.sum() == num_samples
    assert np.abs(counts - deserved).max() < 1 + 1e-6
    assert counts[::7].max() == 0


def test_systematic_draws_favour_no_sample_over_many_epochs():
    sampler = FlowSampler(WEIGHTS)
    counts = np.zeros(1000)
    for epoch in range(200):
        sampler.set_epoch(epoch)
        counts += np.bincount(drawn(sampler), minlength=1000)
    expected = 200_000 * (WEIGHTS / WEIGHTS.sum()).numpy()
    assert np.abs(counts - expected).max() < 5 * math.sqrt(200 * 0.25)  # Bernoulli per epoch


@pytest.mark.parametrize("count", [1_000, 1_000_000])
def test_multinomial_frequencies_pass_a_chi_square_test(count):
    weights = np.random.default_rng(0).random(count) ** 2
    indices = drawn(FlowSampler(weights, 1_000_000, method="multinomial", seed=5))
    counts = np.bincount(indices, minlength=count)
    assert chi_square_is_plausible(counts, 1_000_000 * weights / weights.sum())


@pytest.mark.slow
def test_frequencies_are_right_above_two_to_the_24():
    count = 2**24 + 2**20
    weights = torch.rand(count, generator=torch.Generator().manual_seed(1))
    expected = weights.double().numpy() * (count / weights.sum(dtype=torch.float64).item())
    counts = np.bincount(drawn(FlowSampler(weights)), minlength=count)
    assert np.abs(counts - expected).max() < 1 + 1e-6
    counts = np.bincount(drawn(FlowSampler(weights, method="multinomial")), minlength=count)
    assert chi_square_is_plausible(counts, expected)


def test_no_two_multinomial_draws_hang_together():
    indices = drawn(FlowSampler(torch.ones(1000), 100_000, method="multinomial")) / 1000
    for lag in (1, 2, 4):
        assert abs(np.corrcoef(indices[:-lag], indices[lag:])[0, 1]) < 4 / math.sqrt(100_000)


def test_without_replacement_chances_are_those_of_drawing_one_by_one():
    weights = np.array([8.0, 4.0, 2.0, 1.0, 0.0, 1.0])
    sampler = FlowSampler(weights, 3, replacement=False)
    counts, first = np.zeros(6), np.zeros(6)
    for epoch in range(4000):
        sampler.set_epoch(epoch)
        indices = list(sampler)
        assert len(set(indices)) == 3
        counts[indices] += 1
        first[indices[0]] += 1
    chances = np.array(reference.inclusion_chances(weights, 3))
    spread = 5 * np.sqrt(4000 * chances * (1 - chances)) + 1e-9
    assert (np.abs(counts - 4000 * chances) <= spread).all()
    # The order among those drawn is random: the heavy ones don't come first.
    assert (np.abs(first - counts / 3) <= 5 * np.sqrt(counts)).all()


def test_without_replacement_the_tiniest_weight_comes_before_a_weight_of_zero():
    weights = torch.tensor([1.0, 0.0, 1e-310, 0.0], dtype=torch.float64)
    assert sorted(FlowSampler(weights, 2, replacement=False)) == [0, 2]


def test_without_replacement_and_all_samples_it_is_a_permutation():
    assert sorted(FlowSampler(WEIGHTS, replacement=False)) == list(range(1000))


def test_resampled_batches_have_the_gradient_of_the_weighted_mean_loss():
    generator = torch.Generator().manual_seed(0)
    inputs = torch.randn(500, 8, generator=generator)
    targets = inputs @ torch.randn(8, generator=generator) + torch.randn(500, generator=generator)
    weights = (-torch.rand(500, generator=generator) * 3).exp()
    theta = torch.zeros(8, requires_grad=True)

    def gradient(loss):
        return torch.autograd.grad(loss, theta, retain_graph=True)[0]

    losses = (inputs @ theta - targets) ** 2
    exact = gradient((weights * losses).sum() / weights.sum())
    data = TensorDataset(inputs, targets)
    for method in ("systematic", "multinomial"):
        sampler = FlowSampler(weights, 320, method=method)
        means = []
        for epoch in range(60):
            sampler.set_epoch(epoch)
            loader = DataLoader(data, batch_size=32, sampler=sampler)
            means.append(torch.stack([gradient(((x @ theta - y) ** 2).mean()) for x, y in loader]))
        batches = torch.cat(means)
        error = batches.mean(0) - exact
        spread = batches.std(0) / math.sqrt(len(batches))
        assert (error.abs() < 4 * spread).all()
        uniform = gradient(losses.mean())
        assert ((uniform - exact).abs() > 4 * spread).any()  # the test can tell them apart


# The order.


def test_a_seed_set_later_counts():
    weights = torch.rand(20, generator=torch.Generator().manual_seed(0))
    sampler = FlowSampler(weights, seed=0)
    sampler.seed = 5
    assert list(sampler) == list(FlowSampler(weights, seed=5))
    assert sampler.state_dict()["seed"] == 5
    with pytest.raises(ValueError, match="seed must be an integer >= 0, got -1"):
        sampler.seed = -1


def test_the_order_is_a_function_of_seed_and_epoch():
    sampler = FlowSampler(WEIGHTS, seed=3)
    first = list(sampler)
    assert list(sampler) == first == list(FlowSampler(WEIGHTS, seed=3))
    sampler.set_epoch(1)
    second = list(sampler)
    assert second != first
    assert abs(np.corrcoef(first, second)[0, 1]) < 0.15
    assert list(FlowSampler(WEIGHTS, seed=4)) not in (first, second)
    sampler.set_epoch(0)
    assert list(sampler) == first


def test_the_order_stays_the_same_from_release_to_release():
    weights = torch.tensor([1.0, 2.0, 3.0, 4.0])
    assert list(FlowSampler(weights, 8, seed=1)) == [3, 2, 2, 3, 3, 1, 0, 1]
    multinomial = FlowSampler(weights, 8, seed=1, method="multinomial")
    assert list(multinomial) == [3, 3, 3, 3, 2, 1, 3, 3]
    assert list(FlowSampler(weights, 3, seed=1, replacement=False)) == [3, 2, 1]
    many = iter(FlowSampler(torch.ones(10**6), seed=1))
    assert list(islice(many, 4)) == [806390, 984155, 636023, 36286]


def test_indices_are_python_ints_drawn_lazily():
    sampler = FlowSampler(torch.ones(2_000_000))
    assert type(next(iter(sampler))) is int
    assert sampler.state_dict()["position"] == 1


@pytest.mark.parametrize("options", [{}, {"method": "multinomial"}, {"replacement": False}])
@pytest.mark.parametrize("replicas", [1, 2, 3, 7])
@pytest.mark.parametrize("count", [1, 20, 997])
def test_ranks_deal_out_the_global_order(count, replicas, options):
    whole = list(FlowSampler(WEIGHTS, count, seed=2, **options))
    assert len(whole) == count
    samplers = [
        FlowSampler(WEIGHTS, count, seed=2, num_replicas=replicas, rank=rank, **options)
        for rank in range(replicas)
    ]
    for rank, sampler in enumerate(samplers):
        assert len(sampler) == len(list(sampler))
        assert list(sampler) == whole[rank::replicas]


def test_drop_last_gives_every_rank_as_many():
    whole = list(FlowSampler(WEIGHTS, 23))
    for rank in range(4):
        sampler = FlowSampler(WEIGHTS, 23, num_replicas=4, rank=rank, drop_last=True)
        assert list(sampler) == whole[:20][rank::4]
        assert len(sampler) == 5


def test_drop_last_leaves_out_less_than_one_round_of_ranks_after_a_resumption():
    whole = list(FlowSampler(WEIGHTS, 101))
    first, state = run_ranks(101, 4, 5, drop_last=True)
    second, state = run_ranks(101, 6, 100, state, drop_last=True)
    assert first + second == whole[:98]
    assert state["position"] == 101


def test_loaders_may_ask_for_an_iterator_twice():
    data = TensorDataset(torch.arange(1000))
    sampler = FlowSampler(WEIGHTS)
    whole = list(sampler)
    sampler.load_state_dict({**sampler.state_dict(), "position": 900})
    loader = DataLoader(data, batch_size=None, sampler=sampler, num_workers=2)
    assert [int(row[0]) for row in loader] == whole[900:]


def test_a_copy_goes_on_by_itself():
    sampler = FlowSampler(WEIGHTS)
    iterator = iter(sampler)
    next(iterator)
    copy = pickle.loads(pickle.dumps(sampler))
    assert copy.state_dict() == sampler.state_dict()
    assert list(copy) == list(FlowSampler(WEIGHTS))


def test_it_is_a_distributed_sampler_that_knows_of_no_group():
    sampler = FlowSampler(WEIGHTS)
    assert isinstance(sampler, DistributedSampler)
    assert (sampler.num_replicas, sampler.rank) == (1, 0)


# Stopping and going on.


def run_ranks(count, replicas, take, state=None, **options):
    """Let all ranks take so many indices each; return them in global order, and the state."""
    samplers = [
        FlowSampler(WEIGHTS, count, num_replicas=replicas, rank=r, **options)
        for r in range(replicas)
    ]
    shares = []
    for sampler in samplers:
        if state is not None:
            sampler.load_state_dict(state)
        shares.append(list(islice(sampler, take)))
    longest = max(map(len, shares))
    order = [part[k] for k in range(longest) for part in shares if k < len(part)]
    return order, samplers[0].state_dict()


@pytest.mark.parametrize("options", [{}, {"method": "multinomial"}, {"replacement": False}])
@settings(deadline=None, max_examples=30)
@given(data=st.data(), count=st.integers(1, 60))
def test_any_number_of_ranks_continues_the_very_same_order(data, count, options):
    whole = list(FlowSampler(WEIGHTS, count, **options))
    prefix, state = [], None
    while len(prefix) < count:
        replicas, take = data.draw(st.integers(1, 7)), data.draw(st.integers(1, 20))
        part, state = run_ranks(count, replicas, take, state, **options)
        prefix += part
        assert state["position"] == len(prefix)
    assert prefix == whole


def test_a_state_in_a_later_block_and_epoch_is_exact():
    sampler = FlowSampler(WEIGHTS, 50_000, seed=9)
    sampler.set_epoch(4)
    whole = list(sampler)
    iterator = iter(sampler)
    for _ in range(33_333):
        next(iterator)
    second_run = FlowSampler(WEIGHTS, 50_000, seed=9)
    second_run.load_state_dict(sampler.state_dict())
    second_run.set_epoch(4)  # what a loop does anyway at the start of the epoch it resumes
    assert len(second_run) == 50_000
    assert list(second_run) == whole[33_333:] == list(iterator)
    assert list(second_run) == whole  # the next pass is whole again


def test_setting_another_epoch_drops_what_was_to_be_resumed():
    sampler = FlowSampler(WEIGHTS)
    state = {**sampler.state_dict(), "position": 900}
    sampler.load_state_dict(state)
    sampler.set_epoch(1)
    assert len(list(sampler)) == 1000


def test_a_finished_epoch_is_over_once():
    sampler = FlowSampler(WEIGHTS)
    list(sampler)
    state = sampler.state_dict()
    assert state["position"] == 1000
    second_run = FlowSampler(WEIGHTS)
    second_run.load_state_dict(state)
    assert list(second_run) == []
    assert list(second_run) == list(sampler)
    second_run.set_epoch(1)
    second_run.load_state_dict(state)  # as loaders do that restore late
    assert second_run.epoch == 1
    assert len(list(second_run)) == 1000


def test_prefetching_workers_need_the_consumed_count():
    data = TensorDataset(torch.arange(1000))
    sampler = FlowSampler(WEIGHTS, num_replicas=2, rank=1)
    loader = iter(DataLoader(data, batch_size=8, sampler=sampler, num_workers=2))
    prefix = [index for _ in range(5) for index in next(loader)[0].tolist()]
    del loader
    assert sampler.state_dict()["position"] > 2 * 40
    state = sampler.state_dict(consumed=40)
    assert state["position"] == 2 * 40
    second_run = FlowSampler(WEIGHTS)
    second_run.load_state_dict(state)
    whole = list(FlowSampler(WEIGHTS))
    assert prefix == whole[1:80:2]
    assert list(second_run) == whole[80:]
    second_run.load_state_dict(state)
    iterator = iter(second_run)
    for _ in range(100):
        next(iterator)
    assert second_run.state_dict(consumed=10)["position"] == 90  # of the pass that began at 80
    with pytest.raises(ValueError, match="consumed must lie between 0 and 920, got 921"):
        second_run.state_dict(consumed=921)


def test_a_plain_loader_that_prefetches_goes_on_from_4_to_6_to_1_ranks():
    count, prefix, state = 500, [], None
    data = TensorDataset(torch.arange(1000))
    for replicas, batches in [(4, 7), (6, 8), (1, 1000)]:
        shares = []
        for rank in range(replicas):
            sampler = FlowSampler(WEIGHTS, count, seed=1, num_replicas=replicas, rank=rank)
            if state is not None:
                sampler.load_state_dict(state)
            loader = iter(DataLoader(data, batch_size=5, sampler=sampler, num_workers=2))
            shares.append(torch.cat([batch[0] for batch in islice(loader, batches)]))
            del loader
        prefix += torch.stack(shares, dim=1).flatten().tolist()
        state = sampler.state_dict(consumed=len(shares[0]))
        assert state["position"] == len(prefix)
    assert prefix == list(FlowSampler(WEIGHTS, count, seed=1))


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_stateful_loader_goes_on_from_4_to_6_to_1_ranks(num_workers):
    count, prefix, state = 500, [], None
    data = TensorDataset(torch.arange(1000))

    def loaders(replicas):
        for rank in range(replicas):
            sampler = FlowSampler(WEIGHTS, count, seed=1, num_replicas=replicas, rank=rank)
            yield StatefulDataLoader(data, batch_size=5, sampler=sampler, num_workers=num_workers)

    for replicas, batches in [(4, 7), (6, 8), (1, 1000)]:
        shares, first_state = [], None
        for loader in loaders(replicas):
            if state is not None:
                loader.load_state_dict(state)
            iterator = iter(loader)
            rows = [batch[0] for batch in islice(iterator, batches)]
            first_state = first_state or loader.state_dict()
            shares.append(torch.cat(rows))
            del iterator
        assert len({len(part) for part in shares}) == 1
        prefix += torch.stack(shares, dim=1).flatten().tolist()
        state = first_state
    assert prefix == list(FlowSampler(WEIGHTS, count, seed=1))


def test_a_stateful_loader_that_finished_an_epoch_goes_on_with_the_next():
    data = TensorDataset(torch.arange(1000))

    def build():
        sampler = FlowSampler(WEIGHTS, 40)
        return sampler, StatefulDataLoader(data, batch_size=10, sampler=sampler, num_workers=2)

    sampler, loader = build()
    for epoch in range(2):
        sampler.set_epoch(epoch)
        batches = [batch[0].tolist() for batch in loader]
        if epoch == 0:
            state = loader.state_dict()
    second_sampler, second_run = build()
    second_run.load_state_dict(state)
    second_sampler.set_epoch(1)
    assert [batch[0].tolist() for batch in second_run] == batches


def test_torchdata_nodes_see_and_resume_the_order():
    def build():
        node = SamplerWrapper(FlowSampler(WEIGHTS, 100, seed=1))
        node = ParallelMapper(node, lambda index: index, num_workers=2, method="thread")
        return Loader(Batcher(node, 10))

    loader = build()
    epochs = [[i for batch in loader for i in batch] for _ in range(2)]
    sampler = FlowSampler(WEIGHTS, 100, seed=1)
    for epoch in range(2):
        sampler.set_epoch(epoch)
        assert epochs[epoch] == list(sampler)

    first_run = build()
    iterator = iter(first_run)
    prefix = [i for _ in range(4) for i in next(iterator)]
    second_run = build()
    second_run.load_state_dict(first_run.state_dict())
    assert prefix + [i for batch in second_run for i in batch] == epochs[0]
    assert [i for batch in second_run for i in batch] == epochs[1]


@pytest.mark.parametrize(
    ("other", "named"),
    [
        ({"seed": 1}, "seed=0, this sampler 1"),
        ({"num_samples": 999}, "num_samples=1000, this sampler 999"),
        ({"method": "multinomial"}, "algorithm='systematic', this sampler 'multinomial'"),
        ({"replacement": False}, "algorithm='systematic', this sampler 'gumbel_top_k'"),
        ({"scores_or_weights": WEIGHTS.flip(0)}, "weights="),
    ],
)
def test_states_of_other_samplers_are_refused_and_change_nothing(other, named):
    sampler = FlowSampler(WEIGHTS)
    iterator = iter(sampler)
    next(iterator)
    state = sampler.state_dict()
    options = {"scores_or_weights": WEIGHTS} | other
    foreign = FlowSampler(options.pop("scores_or_weights"), **options)
    with pytest.raises(ValueError, match=f"state_dict has {named}"):
        foreign.load_state_dict(state)
    assert foreign.state_dict()["position"] == 0


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        ({"version": 99}, "state_dict has version=99"),
        ({"position": 1001}, "is 1001 of 1000 draws"),
        ({"position": -1}, "position'. must be an integer >= 0"),
        ({"epoch": None}, "epoch'. must be an integer >= 0"),
    ],
)
def test_damaged_states_are_refused(damage, message):
    sampler = FlowSampler(WEIGHTS)
    with pytest.raises(ValueError, match=message):
        sampler.load_state_dict(sampler.state_dict() | damage)
    with pytest.raises(ValueError, match="state_dict has version=None"):
        sampler.load_state_dict({})


def test_what_is_no_state_is_named():
    with pytest.raises(TypeError, match="must be what FlowSampler"):
        FlowSampler(WEIGHTS).load_state_dict(None)
    with pytest.raises(ValueError, match="consumed must be an integer >= 0"):
        FlowSampler(WEIGHTS).state_dict(consumed=1.5)


def test_a_state_is_plain_data():
    assert FlowSampler(WEIGHTS, 10, seed=3).state_dict() == {
        "version": 1,
        "algorithm": "systematic",
        "seed": 3,
        "num_samples": 10,
        "weights": FlowSampler(WEIGHTS.double()).state_dict()["weights"],
        "epoch": 0,
        "position": 0,
    }


# What goes in.


def test_scores_give_the_weights():
    losses = torch.tensor([0.1, 1.0, 3.0])
    weights = FlowSampler(Scores(losses), temperature="mean").weights
    expected = reference.flow_weights(losses, statistics.mean(losses.tolist()))
    assert weights.tolist() == pytest.approx(expected, rel=1e-6)
    missing = Scores(torch.tensor([0.1, math.nan, 3.0]))
    with pytest.raises(ValueError, match="indices 1"):
        FlowSampler(missing)
    assert 1 not in list(FlowSampler(missing, 100, missing="zero"))


def test_several_scores_make_the_order_of_a_concatenation():
    scores = [Scores(torch.tensor([0.1, 0.2, 0.4])), Scores(torch.tensor([2.0, 5.0]))]
    both = FlowWeightedDataset(ConcatDataset([range(3), range(2)]), scores)
    assert FlowSampler(scores).weights.tolist() == both.weights.tolist()


def test_capped_weights_draw_the_heaviest_samples_less_often():
    weights = torch.tensor([8.0, 1.0, 1.0, 2.0])
    for options, ratios in [({"max_weight": 2.0}, [2, 1, 1, 2]), ({"normalize": "mean"}, weights)]:
        counts = np.bincount(drawn(FlowSampler(weights, 120, **options)))
        expected = np.asarray(ratios) * 120 / float(sum(ratios))
        assert np.abs(counts - expected).max() < 1 + 1e-6
    scores = Scores(torch.tensor([0.1, 1.0, 3.0]))
    options = {"normalize": "mean", "max_weight": 1.5}
    sampler = FlowSampler(scores, **options)
    assert sampler.weights.tolist() == scores.weights(**options).tolist()
    with pytest.raises(ValueError, match="normalize must be"):
        FlowSampler(scores, normalize="sum")


def test_memory_mapped_weights_are_not_copied(tmp_path):
    np.save(tmp_path / "weights.npy", WEIGHTS.numpy())
    memory_map = np.load(tmp_path / "weights.npy", mmap_mode="r")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's, that the map is read-only
        sampler = FlowSampler(memory_map)
    assert np.shares_memory(sampler.weights, memory_map)
    assert list(sampler) == list(FlowSampler(WEIGHTS))


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16, torch.float32, torch.float64])
def test_weights_of_any_floating_type_and_scale_give_the_same_order(dtype):
    weights = torch.tensor([1.0, 0.5, 0.25, 0.0, 2.0])
    expected = list(FlowSampler(weights, 50))
    assert list(FlowSampler(weights.to(dtype), 50)) == expected
    assert list(FlowSampler(weights.double() * 2.0**-1000, 50)) == expected


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"scores_or_weights": torch.tensor([1.0, -1.0])}, ValueError, r"weights\[1\] is -1.0"),
        ({"scores_or_weights": torch.tensor([math.nan])}, ValueError, r"weights\[0\] is nan"),
        ({"scores_or_weights": torch.tensor([1, math.inf])}, ValueError, r"weights\[1\] is inf"),
        ({"scores_or_weights": torch.zeros(3)}, ValueError, "sum to 0; at least one must be posi"),
        ({"scores_or_weights": torch.ones(2).double() * 1.5e308}, ValueError, "scale them"),
        ({"scores_or_weights": torch.ones(3, dtype=torch.int64)}, TypeError, "must be floating"),
        ({"scores_or_weights": torch.ones(0)}, ValueError, "not empty"),
        ({"num_samples": 0}, ValueError, "num_samples must lie between 1 and 2.31 - 1, got 0"),
        ({"num_samples": 2**31}, ValueError, "num_samples must lie between"),
        ({"num_samples": 2.5}, TypeError, "num_samples must be an integer, got 2.5"),
        ({"num_samples": True}, TypeError, "num_samples must be an integer, got True"),
        ({"num_replicas": 0}, ValueError, "num_replicas must be a positive integer, got 0"),
        ({"scores_or_weights": "scores/"}, TypeError, r"pass flowdata.Scores.load\('scores/'\)"),
        ({"scores_or_weights": "auto"}, TypeError, r"flowdata.LossScorer\(model\).score\(dataset"),
        (
            {"scores_or_weights": LossScorer(torch.nn.Linear(1, 1))},
            TypeError,
            r"got LossScorer; pass what its score\(dataset\) returns",
        ),
        ({"method": "residual"}, ValueError, "method must be 'systematic' or 'multinomial'"),
        (
            {"method": "multinomial", "replacement": False},
            ValueError,
            "method='multinomial' is one of drawing with replacement",
        ),
        ({"rank": 2, "num_replicas": 2}, ValueError, "rank must lie between 0 and .* 1, got 2"),
        ({"rank": -1}, ValueError, "got -1"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0"),
        ({"seed": 1.5}, ValueError, "seed must be an integer >= 0"),
        ({"scores_or_weights": TensorDataset(WEIGHTS)}, TypeError, "the weights act twice"),
        (
            {"scores_or_weights": torch.tensor([1.0, 0.0, 1.0]), "replacement": False},
            ValueError,
            "num_samples is 3, but without replacement only the 2 of 3 samples",
        ),
        ({"num_samples": 1001, "replacement": False}, ValueError, "num_samples is 1001"),
    ],
)
def test_bad_input_is_refused(arguments, error, message):
    arguments = {"scores_or_weights": WEIGHTS} | arguments
    with pytest.raises(error, match=message):
        FlowSampler(arguments.pop("scores_or_weights"), **arguments)


# What it tells.


@pytest.mark.parametrize(
    "options", [{}, {"method": "multinomial"}, {"replacement": False, "num_samples": 300}]
)
def test_the_summary_agrees_with_what_is_drawn(options):
    sampler = FlowSampler(WEIGHTS, **options)
    figures = sampler.summary()
    assert figures["effective_sample_size"] == pytest.approx(
        reference.effective_sample_size(WEIGHTS)
    )
    assert figures["mean_weight"] == pytest.approx(WEIGHTS.double().mean().item())
    distinct, heaviest = [], []
    for epoch in range(200):
        sampler.set_epoch(epoch)
        counts = np.bincount(drawn(sampler), minlength=1000)
        distinct.append((counts > 0).mean())
        heaviest.append(counts[WEIGHTS.argmax()])
    assert figures["expected_distinct_share"] == pytest.approx(np.mean(distinct), abs=0.002)
    if "replacement" not in options:
        assert figures["largest_repeat"] == pytest.approx(np.mean(heaviest), abs=0.5)
    else:
        assert figures["largest_repeat"] == 1


def test_the_explanation_is_a_sentence_made_of_the_summary():
    weights = torch.tensor([2.0, 0.0, 1.0, 1.0])
    assert FlowSampler(weights).explain() == (
        "An epoch of 4 systematic draws is expected to see 75.0% of the 4 samples, the heaviest "
        "2.0 times. The effective sample size of the weights is 2.7, their mean 1."
    )
    assert "2 draws without repl" in FlowSampler(weights, 2, replacement=False).explain()


def test_the_explanation_warns_when_few_samples_carry_the_epoch(caplog):
    weights = torch.full((1000,), 1e-4)
    weights[:3] = 1
    FlowSampler(weights).explain()
    (record,) = caplog.records
    assert (record.name, record.levelname) == ("flowdata", "WARNING")
    assert re.search("3 of 1000 samples carry the epoch", record.message)
    caplog.clear()
    FlowSampler(WEIGHTS).explain()
    assert not caplog.records


def test_ess_weights_are_relative_to_the_smallest_loss():
    losses = 7 + 0.05 * torch.randn(500, generator=torch.Generator().manual_seed(0))
    sampler = FlowSampler(Scores(losses), temperature="ess0.5")
    assert sampler.weights.max() == 1
    assert sampler.summary()["effective_sample_size"] == pytest.approx(250, rel=1e-5)


def test_weights_that_vanish_are_warned_of_once_over_epochs(caplog):
    scores = Scores(torch.cat([torch.tensor([0.0]), torch.full((2000,), 7.0)]))
    for epoch in range(3):  # as where a trainer makes the loader of every epoch anew
        sampler = FlowSampler(scores, temperature=0.1)
        sampler.set_epoch(epoch)
        assert set(sampler) == {0}
    (record,) = caplog.records
    assert "the weights of the 2,001 samples have a mean of 0.0005" in record.message


def test_an_epoch_that_is_drawn_again_is_warned_of_once(caplog):
    sampler = FlowSampler(torch.rand(9))
    for _ in range(3):
        list(sampler)
    (record,) = caplog.records
    assert "FlowSampler draws epoch 0 again" in record.message
    caplog.clear()
    other = FlowSampler(torch.rand(9))
    for epoch in (0, 0, 1, 2):
        other.set_epoch(epoch)
        list(other)
    state = other.state_dict(0)
    for _ in range(2):
        other.load_state_dict(state)
        list(other)
    for _ in range(2):  # left before its end
        next(iter(FlowSampler(torch.rand(9))))
    assert not caplog.records


def test_scores_draw_from_the_samples_that_they_are_of():
    torch.manual_seed(0)
    inputs, labels = torch.randn(40, 4), torch.randint(3, (40,))
    dataset, order = TensorDataset(inputs, labels), torch.randperm(40)
    scores = LossScorer(torch.nn.Linear(4, 3), progress=False).score(dataset)
    permuted = TensorDataset(inputs[order], labels[order])
    sampler = FlowSampler(scores)
    assert len(list(DataLoader(dataset, sampler=sampler))) == 40
    with pytest.raises(ScoreMismatchError, match="the scores were made from another data set"):
        list(DataLoader(permuted, sampler=sampler))
    assert len(list(DataLoader(dataset, sampler=pickle.loads(pickle.dumps(sampler))))) == 40
    weights = FlowSampler(scores.weights())  # which are of no data set
    assert len(list(DataLoader(permuted, sampler=weights))) == 40


@pytest.mark.parametrize("other", [{"temperature": "mean"}, {"max_weight": 0.3}])
def test_weights_of_the_same_losses_act_once_whatever_their_temperature(other):
    losses = torch.rand(40, generator=torch.Generator().manual_seed(0)) + 0.1
    scores = Scores(losses, torch.ones(40, dtype=torch.long))
    rows = list(range(40))
    weighted = FlowWeightedDataset(rows, scores, **other)
    with pytest.raises(ValueError, match="so that they would act twice"):
        list(DataLoader(weighted, sampler=FlowSampler(scores)))
    corrected = FlowWeightedDataset(rows, 1 / scores.weights())  # as importance sampling does
    assert len(list(DataLoader(corrected, sampler=FlowSampler(scores.weights())))) == 40
