import random

import numpy as np
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, TensorDataset

from flowdata import FlowWeightedDataset, LossScorer, ScoreMismatchError
from flowdata.errors import SampleError
from flowdata.views import score_views
from tests import reference


class Shaken(Dataset):
    """Draws from all three global generators, as augmenting transforms do."""

    def __init__(self, size=0.5):
        generator = torch.Generator().manual_seed(0)
        self.x = torch.randn(12, 3, generator=generator)
        self.size = size

    def __len__(self):
        return 12

    def __getitem__(self, index):
        shift = random.random() + np.random.rand() + torch.rand(()).item()  # noqa: NPY002
        return self.x[index] + self.size * shift, torch.tensor(index % 2)


def scorer(**options):
    torch.manual_seed(0)
    return LossScorer(nn.Linear(3, 2), "cross_entropy", progress=False, **options)


def test_losses_are_the_mean_over_views():
    one, two, four = (score_views(scorer(), Shaken(), views=views).losses for views in (1, 2, 4))
    second = 2 * two - one
    expected = reference.mean_over_views([one.tolist(), second.tolist()])
    torch.testing.assert_close(two, torch.tensor(expected))
    assert not torch.equal(one, second)  # views differ
    assert not torch.equal(two, four)
    still = score_views(scorer(), Shaken(size=0.0), views=3).losses
    torch.testing.assert_close(still, scorer().score(Shaken(size=0.0)).losses)


def test_many_views_come_near_the_expected_loss():
    model = scorer().model
    many = score_views(scorer(), Shaken(), views=30).losses
    torch.manual_seed(5)
    shifts = torch.rand(4000, 3).sum(1)
    for index in (0, 7):
        x = Shaken().x[index] + 0.5 * shifts[:, None]
        expected = nn.functional.cross_entropy(model(x), torch.full((4000,), index % 2))
        assert many[index].item() == pytest.approx(expected.item(), rel=0.2)


def test_draws_depend_on_the_seed_view_and_index_alone():
    random.seed(3)
    before = random.getstate()
    first = score_views(scorer(), Shaken(), views=2)
    assert random.getstate() == before
    random.seed(4)
    again = score_views(scorer(batch_size=5), Shaken(), views=2, num_workers=2)
    torch.testing.assert_close(again.losses, first.losses)
    assert not torch.equal(score_views(scorer(), Shaken(), views=2, seed=1).losses, first.losses)
    subset = torch.utils.data.Subset(Shaken(), range(6))
    torch.testing.assert_close(score_views(scorer(), subset, views=2).losses, first.losses[:6])


def test_a_name_does_not_stand_for_the_draws_of_another_seed(tmp_path):
    options = {"views": 2, "store": tmp_path, "dataset_id": "shaken"}
    first = score_views(scorer(), Shaken(), **options)
    assert first.metadata["identity"]["dataset"] == "shaken"
    assert torch.equal(score_views(scorer(), Shaken(), **options).losses, first.losses)
    with pytest.raises(ScoreMismatchError, match="view 0 of seed"):
        score_views(scorer(), Shaken(), seed=1, **options)


def test_each_view_is_kept_and_found_again(tmp_path):
    first = score_views(scorer(), Shaken(), views=2, store=tmp_path)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["view-0", "view-1"]
    one = scorer()
    more = score_views(one, Shaken(), views=3, store=tmp_path)
    assert not torch.equal(more.losses, first.losses)
    assert torch.equal(score_views(one, Shaken(), views=2, store=tmp_path).losses, first.losses)
    assert "found in" in one.explain()


def test_the_scores_weigh_the_data_set_they_were_made_of():
    data = Shaken()
    scores = score_views(scorer(), data, views=2)
    assert scores.metadata["identity"]["views"] == 2
    assert len(FlowWeightedDataset(data, scores)) == 12


def test_a_sample_without_a_loss_in_one_view_has_none():
    class Flaky(Shaken):
        def __getitem__(self, index):
            x, y = super().__getitem__(index)
            return (x * torch.nan if index == 3 and random.random() < 0.7 else x), y

    scores = score_views(scorer(), Flaky(), views=8)
    assert scores.losses.isnan().tolist() == [index == 3 for index in range(12)]


class Torn(Shaken):
    """Sample 3 can't be read, and sample 5 not in every view."""

    def __init__(self):
        super().__init__()
        self.reads = 0

    def __getitem__(self, index):
        self.reads += 1
        if index == 3 or (index == 5 and random.random() < 0.5):
            raise OSError(f"sample {index} is torn")
        return super().__getitem__(index)


@pytest.mark.parametrize("name", [None, "torn"])
def test_samples_that_cannot_be_read_have_no_loss_on_request(name):
    data = Torn()
    scores = score_views(scorer(), data, views=8, on_error="skip", dataset_id=name)
    assert scores.losses.isnan().nonzero().flatten().tolist() == [3, 5]
    assert scores.metadata["skipped"] == {
        "3": "OSError: sample 3 is torn",
        "5": "OSError: sample 5 is torn",
    }
    weighted = FlowWeightedDataset(data, scores, missing="zero")
    assert weighted.weights.eq(0).nonzero().flatten().tolist() == [3, 5]


@pytest.mark.parametrize(
    ("make", "options", "error", "message"),
    [
        (scorer, {"on_eror": "skip"}, TypeError, "unexpected keyword argument 'on_eror'"),
        (scorer, {"seed": "0"}, ValueError, "seed must be an integer >= 0, got '0'"),
        (scorer, {"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        (lambda: scorer(token_losses=True), {}, ValueError, "score_views returns no token losses"),
        (lambda: nn.Linear(3, 2), {}, TypeError, "scorer must be a LossScorer, got Linear"),
    ],
)
def test_what_would_fail_or_be_ignored_is_refused_before_any_work(make, options, error, message):
    data = Torn()
    with pytest.raises(error, match=message):
        score_views(make(), data, views=2, **options)
    assert data.reads == 0


def test_a_sample_that_cannot_be_read_is_refused_before_any_is_scored():
    calls = []

    def loss(model, batch):
        calls.append(batch)
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    torch.manual_seed(0)
    one = LossScorer(nn.Linear(3, 2), loss, progress=False)
    with pytest.raises(SampleError, match=r"dataset\[3\] raised OSError"):
        score_views(one, Torn(), views=2)
    assert not calls


@pytest.mark.parametrize("data", [iter([1]), (i for i in range(3)), {"x": [1], "y": [2]}])
def test_a_stream_has_no_views(data):
    with pytest.raises(TypeError, match="dataset must be"):
        score_views(scorer(), data, views=2)


def test_interrupted_views_go_on_where_they_stopped(tmp_path):
    class Power(Exception):
        pass

    one, calls = scorer(batch_size=4), []
    score = one.score

    def fail_at_the_second(*arguments, **options):
        calls.append(options["store"])
        if len(calls) == 2:
            raise Power
        return score(*arguments, **options)

    one.score = fail_at_the_second
    with pytest.raises(Power):
        score_views(one, Shaken(), views=3, store=tmp_path, num_workers=0)
    kept = (tmp_path / "view-0" / "scores.safetensors").stat().st_mtime_ns
    resumed = score_views(scorer(batch_size=4), Shaken(), views=3, store=tmp_path)
    assert (tmp_path / "view-0" / "scores.safetensors").stat().st_mtime_ns == kept
    whole = score_views(scorer(batch_size=4), Shaken(), views=3)
    assert torch.equal(resumed.losses, whole.losses)


@pytest.mark.parametrize("views", [0, -1, 1.5, True])
def test_no_views_are_refused(views):
    data = TensorDataset(torch.ones(2, 3), torch.tensor([0, 1]))
    with pytest.raises(ValueError, match=f"views must be an integer >= 1, got {views}"):
        score_views(scorer(), data, views=views)
