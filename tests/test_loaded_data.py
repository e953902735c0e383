"""A sampler's weights beside the data set of the loader that asks for its indices."""

import pytest
import torch
from torch.utils.data import BatchSampler, DataLoader, Dataset, Sampler
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata import FlowWeightedDataset
from flowdata.sampler import FlowSampler


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


def test_other_weights_than_the_samplers_are_taken():
    for weights in (torch.ones(10), torch.arange(10.0, 0, -1)):
        loader = DataLoader(FlowWeightedDataset(range(10), weights), sampler=flow_sampler(10))
        assert len(list(loader)) == 10
    even = DataLoader(
        FlowWeightedDataset(range(10), torch.ones(10)), sampler=FlowSampler(torch.ones(10))
    )
    assert len(list(even)) == 10
