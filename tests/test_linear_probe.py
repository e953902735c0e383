import logging

import datasets
import pytest
import torch
from torch import nn
from torch.utils.data import Dataset, IterableDataset, TensorDataset

from flowdata.probe.linear_probe import linear_probe
from tests.test_fit import blobs


def quiet(head, dataset, model=None, **options):
    return linear_probe(model or nn.Identity(), head, dataset, progress=False, **options)


def test_the_result_does_not_depend_on_the_heads_first_values_nor_on_grad_mode():
    x, y = blobs()
    torch.manual_seed(1)
    first = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    torch.manual_seed(2)
    with torch.no_grad():
        second = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    assert torch.equal(first.weight, second.weight)


def test_the_head_is_filled_in_place_and_keeps_its_dtype():
    x, y = blobs()
    head = nn.Linear(3, 3, dtype=torch.bfloat16)
    weight = head.weight
    assert quiet(head, TensorDataset(x, y), strength=0.05) is head
    assert head.weight is weight
    assert (head(x.bfloat16()).argmax(1) == y).float().mean() > 0.5


def test_a_second_round_on_a_changed_body_fits_that_body():
    torch.manual_seed(0)
    x, y = blobs()
    body, head = nn.Linear(3, 3), nn.Linear(3, 3)
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    before = head(body(x)).argmax(1)
    with torch.no_grad():
        body.weight.neg_()
        body.bias.neg_()
    quiet(head, TensorDataset(x, y), body, strength=0.01, dtype="float32")
    assert torch.equal(head(body(x)).argmax(1), before)


class Stream(IterableDataset):
    def __iter__(self):
        return iter(zip(*blobs(), strict=True))


def samples():
    yield from zip(*blobs(), strict=True)


@pytest.mark.parametrize(
    "stream", [Stream(), samples(), datasets.IterableDataset.from_generator(samples)]
)
def test_streams_are_refused_with_the_remedy(stream):
    with pytest.raises(TypeError, match=r"must be map-style .* list\(itertools\.islice"):
        quiet(nn.Linear(3, 3), stream)


def test_a_column_of_classes_and_class_numbers_of_python_are_classes():
    x, y = blobs()
    plain = quiet(nn.Linear(3, 3), TensorDataset(x, y), strength=0.05)
    column = quiet(nn.Linear(3, 3), TensorDataset(x, y[:, None]), strength=0.05)
    numbers = quiet(nn.Linear(3, 3), list(zip(x, y.tolist(), strict=True)), strength=0.05)
    assert torch.equal(column.weight, plain.weight)
    assert torch.equal(numbers.weight, plain.weight)


def test_integer_values_of_one_output_are_a_regression():
    x, _ = blobs()
    ages = (10 * x[:, 0]).round().long()
    head = quiet(nn.Linear(3, 1), TensorDataset(x, ages), strength=0.0)
    torch.testing.assert_close(head(x)[:, 0].detach(), ages.float(), atol=2, rtol=0)


class Shaken(Dataset):
    """Augments at random, and counts how often a sample is read."""

    def __init__(self, is_random=True):
        self.x, self.y = blobs(samples=200)
        self.is_random, self.readings = is_random, 0

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        self.readings += 1
        return self.x[index] + (torch.rand(()) if self.is_random else 0), self.y[index]


def test_a_data_set_that_augments_at_random_is_said_once(caplog, monkeypatch, tmp_path):
    monkeypatch.setattr("flowdata.store.random_samples._remarks", set())
    with caplog.at_level(logging.WARNING, "flowdata"):
        for _ in range(2):
            quiet(nn.Linear(3, 3), Shaken(), strength=0.05)
        quiet(nn.Linear(3, 3), Shaken(), strength=0.05, store=tmp_path / "f.safetensors")
    (record,) = caplog.records
    assert "Shaken differs from reading to reading" in record.message
    assert "features, and so the head, are those of one draw. Give the probe the" in record.message


def test_few_samples_of_one_that_does_not_augment_are_read_again(caplog):
    still = Shaken(is_random=False)
    with caplog.at_level(logging.WARNING, "flowdata"):
        quiet(nn.Linear(3, 3), still, strength=0.05)
    assert caplog.text == ""
    assert still.readings < 1.5 * len(still)


def test_a_generator_of_its_own_matters_where_features_are_kept(caplog, monkeypatch, tmp_path):
    generator = torch.Generator()

    class Own(Shaken):
        def __getitem__(self, index):
            return self.x[index] + torch.rand((), generator=generator), self.y[index]

    for store, is_named in ((None, False), (tmp_path / "f.safetensors", True)):
        monkeypatch.setattr("flowdata.store.random_samples._remarks", set())
        caplog.clear()
        with caplog.at_level(logging.WARNING, "flowdata"):
            quiet(nn.Linear(3, 3), Own(), strength=0.05, store=store)
        assert ("pass dataset_id=" in caplog.text) == is_named


def test_fewer_samples_than_folds_are_probed():
    x, y = blobs(samples=4, classes=2)
    head = quiet(nn.Linear(3, 2), TensorDataset(x, y))
    assert torch.equal(head(x).argmax(1), y)


def test_options_are_checked_before_the_body_runs():
    def never(batch):
        raise AssertionError

    x, y = blobs()
    with pytest.raises(ValueError, match="strength must be"):
        quiet(nn.Linear(3, 3), TensorDataset(x, y), collate_fn=never, strength="best")


def test_targets_that_are_no_numbers_or_change_their_shape_are_named():
    x, _ = blobs()
    with pytest.raises(TypeError, match="got list with targets of type tuple, which must be"):
        quiet(nn.Linear(3, 3), [(row, "cat") for row in x])
    ragged = [(row, torch.zeros(1 + place // 50)) for place, row in enumerate(x)]
    with pytest.raises(ValueError, match=r"got \(1,\) and, from sample 50 on, \(2,\) a sample"):
        quiet(nn.Linear(3, 3), ragged, batch_size=10)
