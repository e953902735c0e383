"""Every trainer on two ranks: gradients of the full batch, the samples drawn, runs that go on."""

import pytest
import torch

from tests.integrations import tiny, train_worker
from tests.integrations.test_own_scores import hf, sft
from tests.launched import launch

CASES = ["trainer", "own", "sft", "lightning", "ddp", "fsdp2", "accelerate"]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Where two ranks have left the results of each case of train_worker.py."""
    folder = tmp_path_factory.mktemp("ranks")
    launch(train_worker.__name__, folder, train_worker.cases())
    return folder


def results_of(case, folder):
    if case not in train_worker.cases():
        pytest.skip("TRL from 1.15 on needs Python 3.11")
    return [torch.load(folder / f"{case}.{rank}") for rank in range(2)]


@pytest.mark.parametrize("case", CASES)
def test_gradients_are_those_of_the_full_batch(folder, case):
    for normalize in tiny.NORMALIZE:
        expected = tiny.full_batch_gradient(tiny.make_weights(), normalize)
        for rank in results_of(case, folder):
            for size in (16, 4, 1):
                tiny.assert_same_gradient(rank[size, normalize], expected)


@pytest.mark.parametrize("case", ["held_trainer", "held_sft"])
def test_gradients_of_adapters_held_to_their_base_are_those_of_the_full_batch(folder, case):
    ranks = results_of(case, folder)
    from tests.integrations.test_anchored_trainers import SFT_AND_KL, adapted, by_hand

    expected = by_hand(adapted(), tiny.make_weights(), SFT_AND_KL)
    counts = torch.tensor([int((s["labels"][1:] != -100).sum()) for s in tiny.make_samples()])
    by_weights = counts.sum() / (counts * tiny.make_weights()).sum()
    for rank in ranks:
        for size in (16, 4):
            tiny.assert_same_gradient(rank[size, "count"], expected)
            tiny.assert_same_gradient(rank[size, "weights"], expected * by_weights)


def test_resuming_is_exact(folder):
    for rank in results_of("resumed", folder):
        for normalize in tiny.NORMALIZE:
            for whole, resumed in rank[2, normalize].values():
                assert torch.equal(whole, resumed)
            assert not torch.equal(rank[2, normalize][False][0], rank[2, normalize][True][0])


def test_ranks_score_together_and_train_on_the_same_weights(folder, tmp_path):
    ranks = results_of("own_scores", folder)
    alone = sft(tmp_path, {}, hf(), store=None)
    for normalize in tiny.NORMALIZE:
        for rank in ranks:
            losses, gradient = rank[4, normalize]
            assert torch.equal(losses, alone.scores.losses)
            expected = tiny.full_batch_gradient(alone.scores.weights(), normalize)
            tiny.assert_same_gradient(gradient, expected)


def test_ranks_are_given_the_samples_that_were_drawn(folder):
    ranks = results_of("order", folder)
    for sharing in ("shards", "dispatched", "split"):
        drawn = [sample for rank in ranks for sample in rank["resampled", sharing]]
        assert sorted(drawn) == sorted(ranks[0]["order"])
        # The first batch of a weighted run is looked at before it is trained on.
        shares = [set(rank["stream", sharing]) for rank in ranks]
        assert not shares[0] & shares[1]
        assert sorted(shares[0] | shares[1]) == list(map(float, range(16)))
        for rank in ranks:
            assert "FlowWeightedIterable of 2 ranks would lose" in rank["sharded stream", sharing]
