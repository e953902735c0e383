"""A sampler's weights beside the data set of the loader that asks for its indices."""

import numpy as np
import pytest
import torch
from torch.utils.data import (
    BatchSampler,
    ConcatDataset,
    DataLoader,
    Dataset,
    Sampler,
    Subset,
    WeightedRandomSampler,
    random_split,
)
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata import FlowWeightedDataset
from flowdata.integrations.checks import check_loader
from flowdata.sampler import FlowSampler
from flowdata.sampler.carried_weights import carried_weights


class Mapped(Sampler):
    """Draws some rows of a larger data set, by a map of the user's own."""

    def __init__(self, sampler, rows):
        self.sampler, self.rows = sampler, rows

    def __iter__(self):
        return (self.rows[place] for place in self.sampler)


def flow_sampler(count, **options):
    return FlowSampler(torch.arange(1.0, count + 1), **options)


@pytest.mark.parametrize("loaded", [8, 12])
@pytest.mark.parametrize("make", [DataLoader, StatefulDataLoader])
@pytest.mark.parametrize("options", [{}, {"num_workers": 1}, {"batch_size": None}])
def test_a_data_set_of_another_length_is_refused(make, options, loaded):
    loader = make(range(loaded), sampler=flow_sampler(10), **options)
    with pytest.raises(ValueError, match=rf"weights of 10 samples, the loader's .* has {loaded}:"):
        next(iter(loader))


def test_a_batch_sampler_of_torch_is_seen_through():
    batches = BatchSampler(flow_sampler(10), 4, drop_last=False)
    with pytest.raises(ValueError, match=r"scores\[keep\]"):
        next(iter(DataLoader(range(12), batch_sampler=batches)))


def test_a_loader_prepared_by_accelerate_is_refused_too():
    accelerate = pytest.importorskip("accelerate")
    loader = DataLoader(range(12), sampler=flow_sampler(10), batch_size=2)
    with pytest.raises(ValueError, match="the loader's data set has 12"):
        next(iter(accelerate.Accelerator(cpu=True).prepare(loader)))


@pytest.mark.parametrize("num_samples", [3, 10, 25])
def test_an_epoch_may_be_shorter_or_longer_than_the_data(num_samples):
    loader = DataLoader(range(10), sampler=flow_sampler(10, num_samples=num_samples))
    assert len(list(loader)) == num_samples


def test_what_maps_indices_to_other_rows_is_left_alone():
    rows = range(0, 40, 4)
    loader = DataLoader(range(40), sampler=Mapped(flow_sampler(10), rows), batch_size=None)
    assert set(loader) <= set(rows)


def test_a_sampler_without_a_loader_and_data_without_a_length_tell_nothing():
    class Rows(Dataset):
        def __getitem__(self, index):
            return index

    assert len(list(flow_sampler(10))) == 10
    assert len(list(DataLoader(Rows(), sampler=flow_sampler(10)))) == 10


def test_weights_that_would_act_twice_are_refused():
    weights = torch.arange(1.0, 11)
    weighted = FlowWeightedDataset(range(10), weights)
    loader = DataLoader(weighted, sampler=FlowSampler(3 * weights))
    with pytest.raises(ValueError, match=r"act twice: load the unweighted data set"):
        next(iter(loader))


def views(weighted):
    """Views of a `FlowWeightedDataset` of 10 samples, with the weights that theirs carry."""
    weights = weighted.weights
    one, other = random_split(weighted, [6, 4], generator=torch.Generator().manual_seed(0))
    places = [7, 2, -1, 2, 5]
    tenfold = FlowWeightedDataset(range(5), 10 * weights[:5])
    return {
        "subset": (Subset(weighted, range(8)), weights[:8]),
        "repeated": (Subset(weighted, places), weights[places]),
        "array": (Subset(weighted, np.array(places)), weights[places]),
        "tensor": (Subset(weighted, torch.tensor(places)), weights[places]),
        "nested": (Subset(Subset(weighted, places), [4, 0]), weights[[5, 7]]),
        "split": (one, weights[one.indices]),
        "together": (ConcatDataset([other, one]), weights[other.indices + one.indices]),
        "several": (ConcatDataset([weighted, tenfold]), torch.cat([weights, 10 * weights[:5]])),
        "of several": (
            Subset(ConcatDataset([tenfold, weighted]), [0, 6, 14]),
            torch.stack([10 * weights[0], weights[1], weights[9]]),
        ),
    }


@pytest.mark.parametrize("name", views(FlowWeightedDataset(range(10), torch.ones(10))))
def test_weights_that_would_act_twice_are_refused_through_views(name):
    view, weights = views(FlowWeightedDataset(range(10), torch.arange(1.0, 11)))[name]
    carried = torch.stack([weight for _, weight in (view[place] for place in range(len(view)))])
    assert torch.equal(torch.from_numpy(carried_weights(view)), carried)
    loader = DataLoader(view, sampler=FlowSampler(3 * weights))
    with pytest.raises(ValueError, match=r"act twice: load the unweighted data set"):
        next(iter(loader))
    with pytest.raises(ValueError, match="act twice: a FlowSampler draws"):
        check_loader(loader)
    with pytest.raises(ValueError, match="act twice: a WeightedRandomSampler draws"):
        check_loader(DataLoader(view, sampler=WeightedRandomSampler(3 * weights, 4)))
    others = torch.arange(len(view) + 1.0, 1, -1)
    check_loader(DataLoader(view, sampler=WeightedRandomSampler(others, 4)))
    assert len(list(DataLoader(view, sampler=FlowSampler(others)))) == len(view)


def test_views_of_plain_data_carry_no_weights():
    weighted = FlowWeightedDataset(range(4), torch.ones(4))
    for plain in (Subset(range(4), [1]), ConcatDataset([weighted, range(4)]), range(4)):
        assert carried_weights(plain) is None
    assert len(carried_weights(Subset(weighted, []))) == 0


class Unweighted(Subset):
    """A view of somebody's own that takes the weights off."""

    def __getitem__(self, index):
        return super().__getitem__(index)[0]

    def __getitems__(self, indices):
        return [self[index] for index in indices]


def test_a_view_that_takes_weights_off_may_be_drawn_from_by_them():
    weights = torch.tensor([1.0, 0.5, 0.25, 0.125])
    view = Unweighted(FlowWeightedDataset(torch.arange(4), weights), range(4))
    assert carried_weights(view) is None
    loader = DataLoader(view, batch_size=2, sampler=FlowSampler(weights))
    assert len(torch.cat(list(loader))) == 4


def test_other_weights_than_the_samplers_are_taken():
    for weights in (torch.ones(10), torch.arange(10.0, 0, -1)):
        loader = DataLoader(FlowWeightedDataset(range(10), weights), sampler=flow_sampler(10))
        assert len(list(loader)) == 10
    even = DataLoader(
        FlowWeightedDataset(range(10), torch.ones(10)), sampler=FlowSampler(torch.ones(10))
    )
    assert len(list(even)) == 10
