"""The same samples are recognised in a list, a Subset, a TensorDataset or code, or refused."""

import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, Subset, TensorDataset

from flowdata import FlowWeightedDataset, LossScorer, ScoreMismatchError, Scores
from flowdata.store.fingerprint import fingerprint_dataset
from flowdata.store.fingerprint.containers import is_of_same_samples
from flowdata.store.identity import content_identity, dataset_difference


class Given(Dataset):
    """Gives another data set's samples by code."""

    def __init__(self, data, change=lambda sample, index: sample):
        self.data, self.change = data, change

    def __len__(self):
        return len(self.data)

    def __getitem__(self, index):
        return self.change(self.data[index], index)


def train(count):
    generator = torch.Generator().manual_seed(0)
    return TensorDataset(torch.randn(count, 4, generator=generator), torch.arange(count) % 3)


HOLDERS = {
    "tensors": lambda data: data,
    "list": lambda data: [data[index] for index in range(len(data))],
    "part": lambda data: Subset(data, range(len(data))),
    "class": Given,
}


LARGE = 1500  # samples, of which code gives only some to a fingerprint
PAIRS = [(name, count) for name in ("tensors", "list") for count in (3, 40, LARGE)]


@pytest.mark.parametrize(("scored", "count"), [*PAIRS, ("part", 3), ("part", 40)])
def test_samples_are_recognised_whatever_holds_them(scored, count):
    data = train(count)
    identity = {"dataset": content_identity(HOLDERS[scored](data))}
    scores = Scores(torch.ones(count), metadata={"identity": identity})
    for hold in HOLDERS.values():
        scores.check_dataset(hold(data))
        others = [*HOLDERS["list"](data)[:-1], (data[-1][0], data[-1][1] + 1)]
        for other in (Given(others), others, Subset(data, range(count)[::-1])):
            with pytest.raises(ScoreMismatchError, match="samples differ in content or order, or "):
                scores.check_dataset(hold(other) if hold is not HOLDERS["tensors"] else other)


CHANGES = {
    "a sample's type": lambda sample, index: list(sample),
    "one dtype": lambda sample, index: (sample[0].double() if index == 7 else sample[0], sample[1]),
    "one shape": lambda sample, index: (sample[0][None] if index == 7 else sample[0], sample[1]),
    "numbers": lambda sample, index: (sample[0], int(sample[1])),
    "one more": lambda sample, index: (*sample, sample[1]),
    "an object": lambda sample, index: (*sample, object()),
    "none": lambda sample, index: None,
}


@pytest.mark.parametrize("name", CHANGES)
def test_samples_that_are_not_the_same_to_the_bit_are_none(name):
    data = train(20)
    changed = Given(data, CHANGES[name])
    assert is_of_same_samples(fingerprint_dataset(data), Given(data))
    assert not is_of_same_samples(fingerprint_dataset(data), changed)


def test_random_samples_and_the_callers_generator_are_left_alone():
    data, state = train(20), torch.get_rng_state()
    noisy = Given(data, lambda sample, index: (sample[0] + torch.rand(()), sample[1]))
    scores = Scores(torch.ones(20), metadata={"identity": {"dataset": content_identity(data)}})
    with pytest.raises(ScoreMismatchError, match="gives other samples at each reading"):
        scores.check_dataset(noisy)
    scores.check_dataset(Given(data))
    assert torch.equal(torch.get_rng_state(), state)


@pytest.mark.parametrize("count", [30, 5000])
def test_what_code_gave_is_refused_elsewhere_with_the_true_reason(count, tmp_path):
    data = train(count)
    scorer = LossScorer(nn.Linear(4, 3), progress=False)
    scores = scorer.score(Given(data), store=tmp_path)
    assert len(FlowWeightedDataset(Given(data), scores)) == count
    with pytest.raises(ScoreMismatchError) as caught:
        FlowWeightedDataset(HOLDERS["list"](data), scores)
    message = str(caught.value)
    assert "another class gives them" in message
    assert "number of samples differs" not in message
    assert ("of 5000 samples were fingerprinted there, and all here" in message) == (count == 5000)
    assert "only held by another class" in message
    assert "scores.weights()" in message
    assert "dataset_id=" in message
    with pytest.raises(ScoreMismatchError, match=r"another data set: .* another class gives them"):
        scorer.score(HOLDERS["list"](data), store=tmp_path)


def test_another_length_is_no_other_way_of_reading():
    words = dataset_difference("content:2:ab sampled:512/600", "content:2:cd sampled:512/700")
    assert words.startswith("its samples differ in content or order")
