import copy
import json
import logging
import os
import pickle
import subprocess
import sys
from itertools import islice
from pathlib import Path

import datasets
import numpy as np
import pytest
import torch
from datasets.distributed import split_dataset_by_node
from torch import nn
from torch.utils.data import DataLoader, IterableDataset, get_worker_info
from torchdata.nodes import BaseNode, Batcher, IterableWrapper, Loader, Mapper
from torchdata.stateful_dataloader import StatefulDataLoader

from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.streaming import FlowWeightedIterable
from flowdata.weights import resolve_temperature
from tests import reference
from tests.leave_ranks import leave_ranks

COUNT, WINDOW = 50, 8
GENERATOR = torch.Generator().manual_seed(0)
INPUTS = torch.randn(COUNT, 4, generator=GENERATOR) * 2
LABELS = torch.randint(3, (COUNT,), generator=GENERATOR)


def scorer():
    torch.manual_seed(1)
    return LossScorer(nn.Linear(4, 3), "cross_entropy", dtype="float32", progress=False)


@torch.no_grad()
def loss_of(index):
    torch.manual_seed(1)
    model = nn.Linear(4, 3)
    return nn.functional.cross_entropy(model(INPUTS[index]), LABELS[index]).item()


def collate(samples):
    """What the scorer's model gets; samples are indices or rows with an index."""
    indices = [s["index"] if isinstance(s, dict) else s for s in samples]
    return INPUTS[indices], LABELS[indices]


class Split(IterableDataset):
    """A stream as PyTorch asks for: it splits itself between workers and keeps its state."""

    def __init__(self):
        self.position = 0

    def __iter__(self):
        worker = get_worker_info()
        first, step = (0, 1) if worker is None else (worker.id, worker.num_workers)
        start, self.position = self.position, 0
        for index in range(start or first, COUNT, step):
            self.position = index + step
            yield index

    def state_dict(self):
        return {"position": self.position}

    def load_state_dict(self, state):
        self.position = state["position"]


def hugging_face():
    return datasets.Dataset.from_dict({"index": range(COUNT)}).to_iterable_dataset(num_shards=2)


def node():
    return Mapper(IterableWrapper(range(COUNT)), int)


def loader():
    return StatefulDataLoader(Split(), batch_size=None, num_workers=1)


SOURCES = {
    "list": lambda: list(range(COUNT)),
    "torch stream": Split,
    "hugging face stream": hugging_face,
    "torchdata node": node,
    "loader with a worker": loader,
}


def build(source=None, **options):
    source = list(range(COUNT)) if source is None else source
    return FlowWeightedIterable(
        source, scorer(), **({"window": WINDOW, "collate_fn": collate} | options)
    )


def plain(items):
    """(index, weight) pairs as numbers."""
    return [(s["index"] if isinstance(s, dict) else int(s), w.item()) for s, w in items]


# Weights.


def windows(count=COUNT, window=WINDOW):
    return [range(start, min(start + window, count)) for start in range(0, count, window)]


@pytest.mark.parametrize("source", SOURCES)
def test_weights_under_a_running_median_are_those_of_the_exact_one(source):
    items = plain(build(SOURCES[source]()))
    indices, weights = zip(*items, strict=True)
    assert sorted(indices) == list(range(COUNT))
    order = [indices[w.start : w.stop] for w in windows()]
    expected = reference.running_median_weights(order, loss_of)
    assert weights == pytest.approx(expected, rel=0.01)  # loss / temperature times 0.1 %


def test_weights_under_a_batch_median_or_a_fixed_temperature():
    losses = [[loss_of(index) for index in window] for window in windows()]
    of_batches = [
        w for part in losses for w in reference.flow_weights(part, reference.median(part))
    ]
    weights = [weight for _, weight in plain(build(temperature="batch_median"))]
    assert weights == pytest.approx(of_batches, rel=1e-4)
    fixed = [weight for part in losses for weight in reference.flow_weights(part, 0.7)]
    assert [w for _, w in plain(build(temperature=0.7))] == pytest.approx(fixed, rel=1e-4)


def test_the_running_median_goes_on_over_epochs():
    stream = build()
    list(stream)
    assert stream.state_dict()["median"]
    counted = sum(stream.state_dict()["median"].values())
    list(stream)
    assert sum(stream.state_dict()["median"].values()) == 2 * counted == 2 * COUNT


def test_layouts_are_those_of_the_map_style_data_set():
    row = next(iter(build(hugging_face(), layout="dict", key="importance")))
    assert row["importance"].dtype == torch.float32
    assert row["importance"].untyped_storage().nbytes() == 4
    batch, weight = next(iter(DataLoader(build(), batch_size=5)))
    assert batch.tolist() == [0, 1, 2, 3, 4]
    assert weight.shape == (5,)


def test_a_sample_without_a_loss_is_refused_or_weighs_nothing():
    def gap(model, batch):
        losses = nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")
        return losses.masked_fill((batch[0] == INPUTS[11]).all(1), float("nan"))

    torch.manual_seed(1)
    gappy = LossScorer(nn.Linear(4, 3), gap, dtype="float32", progress=False)
    options = {"window": WINDOW, "collate_fn": collate}
    stream = FlowWeightedIterable(range(COUNT), gappy, **options)
    with pytest.raises(ValueError, match="sample 11 of the stream has no loss"):
        list(stream)
    stream = FlowWeightedIterable(range(COUNT), gappy, missing="zero", **options)
    weights = [weight.item() for _, weight in stream]
    assert weights[11] == 0
    assert min(weights[:11] + weights[12:]) > 0
    assert sum(stream.state_dict()["median"].values()) == COUNT - 1


class Given:
    """Scores samples that are their own losses."""

    def score(self, window, *, collate_fn=None, dataset_id=None):
        return Scores(torch.tensor(window))


@pytest.mark.parametrize("temperature", ["running_median", "batch_median"])
def test_a_median_of_zero_is_refused_with_a_remedy(temperature):
    zeros = LossScorer(nn.Linear(4, 3), lambda model, batch: torch.zeros(len(batch[0])))
    stream = FlowWeightedIterable(
        range(COUNT), zeros, temperature=temperature, window=WINDOW, collate_fn=collate
    )
    with pytest.raises(ValueError, match=f"'{temperature}' is 0 .* pass a positive float"):
        list(stream)


def test_a_running_median_of_zero_waits_while_the_weights_do_not_depend_on_it():
    losses = [0.0] * 8 + [1.0, 2.0, 3.0, 4.0, 5.0, 6.0, 7.0, 8.0] + [2.0] * 8
    stream = FlowWeightedIterable(losses, Given(), window=4)
    first = [weight.item() for _, weight in islice(stream, 8)]
    assert first == [1.0] * 8
    with pytest.raises(ValueError, match=r"is 0 up to sample 12 of the stream.* larger window"):
        list(stream)
    larger = FlowWeightedIterable(losses, Given(), window=8)
    weights = [weight.item() for _, weight in larger]
    assert weights[:8] == [1.0] * 8
    assert weights[8:16] == pytest.approx(
        reference.flow_weights(losses[8:16], reference.median(losses[:16])), rel=0.02
    )


@pytest.mark.parametrize("stop", [3, 4, 5, 8, 11])
def test_a_stream_resumes_while_its_median_is_zero(stop):
    def make():
        return FlowWeightedIterable([0.0] * 8 + [1.0] * 20, Given(), window=8)

    first_run, second_run = make(), make()
    prefix = [weight.item() for _, weight in islice(first_run, stop)]
    second_run.load_state_dict(json.loads(json.dumps(first_run.state_dict())))
    whole = [weight.item() for _, weight in make()]
    assert prefix + [weight.item() for _, weight in second_run] == whole


def test_a_source_of_zeros_alone_is_refused_at_its_end():
    stream = FlowWeightedIterable([0.0] * 10, Given(), window=4)
    iterator = iter(stream)
    assert [weight.item() for _, weight in islice(iterator, 10)] == [1.0] * 10
    with pytest.raises(ValueError, match="'running_median' is 0 over the whole stream"):
        next(iterator)
    assert len(list(FlowWeightedIterable([0.0] * 10, Given(), window=4, temperature=1.0))) == 10


def test_negative_losses_are_refused_by_their_name():
    stream = FlowWeightedIterable([1.0, -2.0, 3.0], Given())
    with pytest.raises(ValueError, match=r"losses\[1\] is -2.0"):
        list(stream)


def test_a_scorer_of_another_number_of_losses_is_refused():
    class Short:
        def score(self, window, *, collate_fn=None, dataset_id=None):
            return Scores(torch.ones(2))

    with pytest.raises(ValueError, match="gave 2 losses for a window of 5 samples"):
        list(FlowWeightedIterable(range(5), Short()))


# Sources.


class ByIndex:
    """Map-style and nothing else; an index too large raises no IndexError."""

    def __len__(self):
        return COUNT

    def __getitem__(self, index):
        return index % COUNT


class ByIteration:
    def __iter__(self):
        return iter(range(COUNT))


class Rewinding:
    """An iterator of its own that begins again, as textbooks write it."""

    def __iter__(self):
        self.index = 0
        return self

    def __next__(self):
        if self.index == COUNT:
            raise StopIteration
        self.index += 1
        return self.index - 1


class TellsWhenTold:
    """Its state depends on what the loader tells it, as in MosaicML's and LitData's streams."""

    def __iter__(self):
        return iter(range(COUNT))

    def state_dict(self, num_samples):
        return {"read": num_samples}

    def load_state_dict(self, state):
        raise AssertionError


class Live(Split):
    """Returns the very dictionary that it writes to."""

    def __init__(self):
        super().__init__()
        self.state = {"position": 0}

    def __iter__(self):
        for index in super().__iter__():
            self.state["position"] = self.position
            yield index

    def state_dict(self):
        return self.state


class Empty(Live):
    """Has nothing to say before it is read."""

    def __iter__(self):
        self.position = self.state.pop("resume", 0)
        return super().__iter__()

    def __init__(self):
        super().__init__()
        self.state = {}

    def load_state_dict(self, state):
        self.state = {"resume": state["position"]}


KINDS = {
    "index alone": ByIndex,
    "iteration alone": ByIteration,
    "an iterator that rewinds": Rewinding,
    "a state that needs arguments": TellsWhenTold,
    "a state that goes on changing": Live,
    "a state that begins empty": Empty,
    "torch stream": Split,
    "hugging face rows": lambda: datasets.Dataset.from_dict({"index": range(COUNT)}),
    "hugging face stream": hugging_face,
    "array": lambda: np.arange(COUNT),
    "keys": lambda: dict.fromkeys(range(COUNT)).keys(),
    "torchdata node": node,
    "loader without batches": lambda: DataLoader(range(COUNT), batch_size=None),
    "loader of a torch stream": lambda: StatefulDataLoader(Split(), batch_size=None),
    "loader of a hugging face stream": lambda: StatefulDataLoader(hugging_face(), batch_size=None),
    "loader with a persistent worker": lambda: StatefulDataLoader(
        Split(), batch_size=None, num_workers=1, persistent_workers=True
    ),
}


def indices(items):
    return [index for index, _ in plain(items)]


@pytest.mark.parametrize("kind", KINDS)
def test_any_iterable_is_a_source(kind):
    stream = build(KINDS[kind]())
    prefix = indices(islice(stream, 11))
    state = json.loads(json.dumps(stream.state_dict()))
    assert sorted(indices(stream)) == list(range(COUNT))  # from the start again
    resumed = build(KINDS[kind]())
    resumed.load_state_dict(state)
    assert sorted(prefix + indices(resumed)) == list(range(COUNT))
    assert sorted(indices(resumed)) == list(range(COUNT))


ONE_PASS = {
    "generator": lambda: (index for index in range(COUNT)),
    "map": lambda: map(int, range(COUNT)),
    "node of a generator": lambda: IterableWrapper(index for index in range(COUNT)),
    "chain of nodes": lambda: Mapper(IterableWrapper(iter(range(COUNT))), int),
}


@pytest.mark.parametrize("count", [11, COUNT])
@pytest.mark.parametrize("kind", ONE_PASS)
def test_what_can_be_read_once_gives_one_pass(kind, count):
    stream = build(ONE_PASS[kind]())
    iterator = iter(stream)
    assert indices(islice(iterator, count)) == list(range(count))
    assert next(iterator, None) is None or count < COUNT
    with pytest.raises(ValueError, match="dataset can be read only once, and has been"):
        list(stream)


def test_a_generator_resumes_in_another_process():
    stream = build(ONE_PASS["generator"]())
    prefix = indices(islice(stream, 11))
    resumed = build(ONE_PASS["generator"]())
    resumed.load_state_dict(stream.state_dict())
    assert prefix + indices(resumed) == list(range(COUNT))


def test_a_state_of_another_kind_of_source_is_refused():
    stream = build(Split())
    list(islice(stream, 11))
    with pytest.raises(ValueError, match="this stream's source, list, has no load_state_dict"):
        build().load_state_dict(stream.state_dict())


@pytest.mark.parametrize("count", [1, 7, 50])
@pytest.mark.parametrize("replicas", [2, 3])
def test_every_sample_is_given_once_whatever_the_shares(count, replicas):
    items = []
    for rank in range(replicas):
        stream = build(list(range(count)), num_replicas=replicas, rank=rank)
        items += indices(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(items) == list(range(count))


# Reading.


def test_no_more_than_a_window_is_read_ahead():
    read = []

    def source():
        for index in range(COUNT):
            read.append(index)
            yield index

    iterator = iter(build(source()))
    for passed in range(1, 30):
        next(iterator)
        assert len(read) <= passed + WINDOW - 1


@pytest.mark.parametrize("source", ["list", "torch stream", "hugging face stream"])
def test_workers_share_the_stream(source):
    loader = DataLoader(build(SOURCES[source]()), batch_size=None, num_workers=2)
    assert sorted(index for index, _ in plain(loader)) == list(range(COUNT))


def test_ranks_share_a_stream_that_each_reads_whole():
    parts = [[i for i, _ in plain(build(num_replicas=3, rank=rank))] for rank in range(3)]
    assert parts == [list(range(rank, COUNT, 3)) for rank in range(3)]


def test_ranks_and_workers_share_a_stream_together():
    items = []
    for rank in range(2):
        stream = build(num_replicas=2, rank=rank)
        items += plain(DataLoader(stream, batch_size=None, num_workers=2))
    assert sorted(index for index, _ in items) == list(range(COUNT))


def test_a_stream_split_by_node_needs_no_ranks():
    items = []
    for rank in range(2):
        part = split_dataset_by_node(hugging_face(), rank, 2)
        items += [index for index, _ in plain(build(part))]
    assert sorted(items) == list(range(COUNT))


# Stopping and going on.


@pytest.mark.parametrize("stop", [0, 1, 7, 8, 9, 31, COUNT - 1, COUNT])
@pytest.mark.parametrize("source", SOURCES)
def test_a_stream_resumes_exactly(source, stop, tmp_path):
    whole = plain(build(SOURCES[source]()))
    first_run = build(SOURCES[source]())
    prefix = plain(islice(first_run, stop))
    torch.save(first_run.state_dict(), tmp_path / "state.pt")
    second_run = build(SOURCES[source]())
    second_run.load_state_dict(torch.load(tmp_path / "state.pt"))
    assert prefix + plain(second_run) == whole


def test_a_finished_stream_is_over_once():
    stream = build(Split())
    list(stream)
    second_run = build(Split())
    second_run.load_state_dict(stream.state_dict())
    assert list(second_run) == []
    assert len(list(second_run)) == COUNT


@pytest.mark.parametrize("source", ["list", "hugging face stream", "torchdata node"])
def test_the_pass_after_a_resumed_one_is_whole(source):
    stream = build(SOURCES[source]())
    list(islice(stream, 7))
    second_run = build(SOURCES[source]())
    second_run.load_state_dict(json.loads(json.dumps(stream.state_dict())))
    assert len(list(second_run)) == COUNT - 7
    assert len(list(second_run)) == COUNT


def test_a_resumed_window_is_not_counted_twice():
    first_run = build()
    list(islice(first_run, 11))
    second_run = build()
    second_run.load_state_dict(first_run.state_dict())
    list(second_run)
    assert sum(second_run.state_dict()["median"].values()) == COUNT


def test_every_sample_has_its_own_weight_where_the_source_does_not_resume_exactly():
    def make():  # the samples in its buffer are lost, and others take their place
        return build(hugging_face().shuffle(seed=0, buffer_size=10), temperature=0.7)

    first_run = make()
    list(islice(first_run, 11))
    second_run = make()
    second_run.load_state_dict(first_run.state_dict())
    items = plain(second_run)
    assert [index for index, _ in items] != [index for index, _ in plain(make())][11:]
    expected = reference.flow_weights([loss_of(index) for index, _ in items], 0.7)
    assert [weight for _, weight in items] == pytest.approx(expected, rel=1e-4)


@pytest.mark.parametrize("num_workers", [0, 2])
@pytest.mark.parametrize("source", ["list", "torch stream", "hugging face stream"])
def test_a_stateful_loader_resumes_the_stream(source, num_workers):
    def make():
        return StatefulDataLoader(build(SOURCES[source]()), batch_size=3, num_workers=num_workers)

    def take(batches):
        return [(i, w) for b in batches for i, w in zip(*plain_batch(b), strict=True)]

    def plain_batch(batch):
        samples, weights = batch
        samples = samples["index"] if isinstance(samples, dict) else samples
        return samples.tolist(), weights.tolist()

    whole = take(make())
    assert sorted(index for index, _ in whole) == list(range(COUNT))
    first_run = make()
    iterator = iter(first_run)
    prefix = take(islice(iterator, 7))
    state = first_run.state_dict()
    del iterator
    second_run = make()
    second_run.load_state_dict(state)
    assert prefix + take(second_run) == whole


def test_a_stream_is_a_node_like_any_other():
    def make():
        return Loader(Batcher(IterableWrapper(build()), 5))

    whole = [plain(batch) for batch in make()]
    first_run = make()
    iterator = iter(first_run)
    prefix = [plain(next(iterator)) for _ in range(4)]
    second_run = make()
    second_run.load_state_dict(first_run.state_dict())
    assert prefix + [plain(batch) for batch in second_run] == whole


def test_a_break_or_a_zip_leaves_the_exact_position():
    stream = build()
    for _, (index, _) in zip(range(11), stream, strict=False):
        if index == 5:
            break
    assert stream.state_dict()["yielded"] == 6
    for index, _ in stream:  # a new pass
        if index == 12:
            break
    resumed = build()
    resumed.load_state_dict(stream.state_dict())
    assert indices(resumed) == list(range(13, COUNT))
    list(zip(stream, range(3), strict=False))  # zip takes a fourth and drops it
    resumed.load_state_dict(stream.state_dict())
    assert indices(resumed) == list(range(4, COUNT))


def test_states_between_passes_lead_to_the_pass_that_follows():
    stream = build()
    fresh = stream.state_dict()
    list(stream)
    ended = stream.state_dict()
    stream.set_epoch(1)
    between = stream.state_dict()
    for state, count in [(fresh, COUNT), (ended, 0), (between, COUNT)]:
        resumed = build()
        resumed.load_state_dict(state)
        assert resumed.state_dict() == state
        assert len(list(resumed)) == count
    assert between["epoch"] == 1


@pytest.mark.parametrize("end", ["another pass", "the next epoch", "a state"])
def test_an_iterator_whose_position_has_gone_elsewhere_is_over(end):
    stream = build()
    iterator = iter(stream)
    next(iterator)
    if end == "another pass":
        assert indices(islice(stream, 3)) == [0, 1, 2]
    elif end == "the next epoch":
        stream.set_epoch(1)
    else:
        stream.load_state_dict(build().state_dict())
    with pytest.raises(RuntimeError, match="this iterator of the stream is over"):
        next(iterator)
    assert len(list(stream)) == COUNT


def test_a_stream_zipped_with_itself_is_refused():
    stream = build()
    with pytest.raises(RuntimeError, match="one pass at a time"):
        list(zip(stream, stream, strict=True))


class Unseeded:
    def __init__(self):
        self.generator = np.random.default_rng()

    def __iter__(self):
        return iter(self.generator.permutation(COUNT).tolist())


class Swallowing(Split):
    """Reads all of itself into a buffer, which its state does not hold."""

    def __iter__(self):
        return iter(list(super().__iter__()))


SHUFFLED = {
    "a shuffle buffer": lambda: hugging_face().shuffle(seed=0, buffer_size=10),
    "a buffer of the whole": Swallowing,
    "no seed": Unseeded,
    "a loader without a state": lambda: DataLoader(
        range(COUNT), sampler=list(Unseeded()), batch_size=None
    ),
}


@pytest.mark.parametrize("kind", SHUFFLED)
def test_a_share_that_is_lost_or_repeated_is_said_at_resumption(kind, caplog):
    stream = build(SHUFFLED[kind]())
    list(islice(stream, 11))
    state = json.loads(json.dumps(stream.state_dict()))
    assert "where it stood" not in caplog.text
    resumed = build(SHUFFLED[kind]())
    resumed.load_state_dict(state)
    list(resumed)
    said = [message for message in caplog.messages if "does not go on where it stood" in message]
    assert len(said) == 1
    assert "after 8 samples it gives others" in said[0]


class Forgetful(Split):
    """Gives a state that it can't take up again."""

    def load_state_dict(self, state):
        if state["position"]:
            raise IndexError("list index out of range")
        super().load_state_dict(state)


class ForgetfulWhenRead(Forgetful):
    """Finds it out when it is read, as Hugging Face's streams do."""

    def load_state_dict(self, state):
        self.state = state

    def __iter__(self):
        if self.state:
            super().load_state_dict(self.state)
        return super().__iter__()

    state = None


@pytest.mark.parametrize("kind", [Forgetful, ForgetfulWhenRead])
def test_a_source_that_cannot_take_up_its_own_state_is_named(kind):
    stream = build(kind())
    list(islice(stream, 11))
    state = stream.state_dict()
    resumed = build(kind())
    resumed.load_state_dict(state)
    message = f"source, {kind.__name__}, can't go on .*IndexError: list index out of range"
    with pytest.raises(ValueError, match=message):
        next(iter(resumed))


def test_a_shuffled_stream_that_several_workers_resume_is_refused_by_name():
    def loader():
        source = datasets.Dataset.from_dict({"index": list(range(COUNT))})
        source = source.to_iterable_dataset(num_shards=4).shuffle(seed=0, buffer_size=4)
        return StatefulDataLoader(build(source, window=3), batch_size=None, num_workers=2)

    first = loader()
    list(islice(first, 13))
    state = first.state_dict()
    resumed = loader()
    resumed.load_state_dict(state)
    with pytest.raises(ValueError, match="A shuffled Hugging Face stream can't"):
        list(resumed)


@pytest.mark.parametrize("kind", [*KINDS, "shards in another order"])
def test_nothing_is_said_where_a_source_resumes_exactly(kind, caplog):
    def make():
        if kind in KINDS:
            return build(KINDS[kind]())
        return build(hugging_face().shuffle(seed=0, buffer_size=1))

    stream = make()
    for stop in (3, 8, 11):
        list(islice(stream, stop))
        resumed = make()
        resumed.load_state_dict(stream.state_dict())
        next(iter(resumed))
    assert not [message for message in caplog.messages if "go on where it stood" in message]


def test_states_of_other_streams_are_refused():
    state = build().state_dict()
    for other, named in [
        ({"window": 4}, "window=8, this stream 4"),
        ({"temperature": 0.5}, "temperature='running_median', this stream 0.5"),
        ({"resample": True}, "resample=False, this stream True"),
        ({"num_replicas": 2}, r"share=\[0, 1\], this stream \[0, 2\]"),
    ]:
        with pytest.raises(ValueError, match=f"state_dict has {named}"):
            build(**other).load_state_dict(state)
    with pytest.raises(ValueError, match="version=None"):
        build().load_state_dict({})


# Resampling.


def test_resampling_accepts_a_sample_as_often_as_its_weight():
    weights = [weight for _, weight in plain(build(temperature=1.0))]
    stream = build(temperature=1.0, resample=True, window=COUNT)
    counts = torch.zeros(COUNT)
    for epoch in range(100):
        stream.set_epoch(epoch)
        counts[list(stream)] += 1
    chances = torch.tensor(weights)
    assert ((counts - 100 * chances).abs() < 5 * (100 * chances * (1 - chances)).sqrt()).all()


def test_resampling_is_a_function_of_seed_and_epoch_and_resumes_exactly():
    def make(seed=3, epoch=0):
        stream = build(resample=True, seed=seed)
        stream.set_epoch(epoch)
        return stream

    whole = list(make())
    assert whole == list(make())
    assert whole != list(make(seed=4))
    assert whole != list(make(epoch=1))
    first_run = make()
    prefix = list(islice(first_run, 9))
    second_run = make()
    second_run.load_state_dict(first_run.state_dict())
    assert prefix + list(second_run) == whole


def test_epochs_reach_a_shuffled_source():
    stream = build(hugging_face().shuffle(seed=0, buffer_size=20))
    first = plain(stream)
    stream.set_epoch(1)
    second = plain(stream)
    assert [i for i, _ in first] != [i for i, _ in second]
    assert sorted(i for i, _ in second) == list(range(COUNT))


@pytest.mark.parametrize(
    ("loader", "context"),
    [(DataLoader, "fork"), (DataLoader, "spawn"), (StatefulDataLoader, "fork")],
)
def test_epochs_reach_persistent_workers(loader, context):
    options = {"resample": True, "temperature": 1.0, "source": list(range(COUNT))}
    stream = build(**options)
    workers = {"batch_size": None, "num_workers": 2}
    persistent = loader(stream, persistent_workers=True, multiprocessing_context=context, **workers)
    epochs = []
    for epoch in (0, 1, 5, 5):
        stream.set_epoch(epoch)
        epochs.append(list(persistent))
    assert epochs[0] != epochs[1] != epochs[2] == epochs[3]
    fresh = build(**options)
    fresh.set_epoch(5)
    assert list(loader(fresh, **workers)) == epochs[2]


class ByEpoch(IterableDataset):
    """Another order in every epoch; the epoch is this process's own."""

    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def __iter__(self):
        worker = get_worker_info()
        number, count = (0, 1) if worker is None else (worker.id, worker.num_workers)
        return iter([(index + self.epoch) % COUNT for index in range(COUNT)][number::count])


class EpochNode(BaseNode):
    epoch = 0

    def set_epoch(self, epoch):
        self.epoch = epoch

    def reset(self, initial_state=None):
        super().reset(initial_state)
        self.index = 0 if initial_state is None else initial_state["index"]

    def next(self):
        if self.index == COUNT:
            raise StopIteration
        self.index += 1
        return (self.index - 1 + self.epoch) % COUNT

    def get_state(self):
        return {"index": self.index}


def test_epochs_reach_the_source_in_persistent_workers():
    stream = build(ByEpoch())
    workers = DataLoader(stream, batch_size=None, num_workers=2, persistent_workers=True)
    for epoch in (0, 3):
        stream.set_epoch(epoch)
        items = [index for index, _ in plain(workers)]
        assert sorted(items) == list(range(COUNT))
        assert items[:2] == [epoch, epoch + 1]


@pytest.mark.parametrize(
    "make", [ByEpoch, EpochNode, lambda: DataLoader(ByEpoch(), batch_size=None)]
)
def test_epochs_reach_what_a_source_reads(make):
    stream = build(make())
    stream.set_epoch(3)
    assert indices(islice(stream, 2)) == [3, 4]


@pytest.mark.parametrize("num_workers", [0, 2])
def test_a_loader_resumes_in_its_epoch(num_workers):
    def make():
        stream = build(resample=True, temperature=1.0)
        loader = StatefulDataLoader(stream, batch_size=None, num_workers=num_workers)
        return stream, loader

    stream, loader = make()
    stream.set_epoch(4)
    whole = list(loader)
    iterator = iter(loader)
    prefix = list(islice(iterator, 5))
    state = loader.state_dict()
    del iterator
    _, resumed = make()
    resumed.load_state_dict(state)
    assert prefix + list(resumed) == whole


def test_copies_of_a_stream_have_epochs_of_their_own():
    stream = build(resample=True)
    twin = copy.deepcopy(stream)
    read = pickle.loads(pickle.dumps(stream))
    stream.set_epoch(2)
    assert list(twin) == list(read) == list(build(resample=True)) != list(stream)


def test_a_position_that_is_the_workers_is_not_asked_of_the_stream():
    stream = build()
    state = stream.state_dict()
    iterator = iter(DataLoader(stream, batch_size=None, num_workers=2))
    list(islice(iterator, 5))
    with pytest.raises(ValueError, match="save the state_dict of a torchdata"):
        stream.state_dict()
    del iterator
    stream.load_state_dict(state)
    with pytest.raises(ValueError, match="has loaded a state outside the loader's workers"):
        list(DataLoader(stream, batch_size=None, num_workers=2))
    stream.set_epoch(1)  # which takes the state away
    assert len(list(DataLoader(stream, batch_size=None, num_workers=2))) == COUNT


# What is said.


def test_a_scorer_is_left_as_it_is_and_speaks_once(capsys, monkeypatch):
    monkeypatch.setattr(logging.getLogger(), "handlers", [])
    torch.manual_seed(1)
    talking = LossScorer(nn.Linear(4, 3), dtype="float32")
    before = dict(vars(talking))
    stream = FlowWeightedIterable(range(COUNT), talking, window=WINDOW, collate_fn=collate)
    weights = [weight for _, weight in plain(stream)]
    list(stream)
    captured = capsys.readouterr()
    assert captured.out == ""
    lines = captured.err.strip().splitlines()
    assert len([line for line in lines if "guess" not in line]) == 1  # the model is random
    assert "windows of a stream: cross_entropy in float32" in captured.err
    assert vars(talking) == before
    assert stream.scorer is talking
    assert weights == [weight for _, weight in plain(build())]
    talking.score(list(range(COUNT)), collate_fn=collate)
    assert "scoring" in capsys.readouterr().err


def test_windows_are_spared_a_pass_over_the_parameters(monkeypatch):
    def refuse(*args, **options):
        raise AssertionError("the model was fingerprinted")

    monkeypatch.setattr("flowdata.scoring.scorer.fingerprint_model", refuse)
    assert len(plain(build())) == COUNT


# What goes in.


@pytest.mark.parametrize(
    ("options", "error", "message"),
    [
        ({"source": 3}, TypeError, "dataset must be iterable, got int"),
        ({"temperature": "median"}, ValueError, "must be 'running_median', 'batch_median' or"),
        ({"temperature": lambda losses: 1.0}, ValueError, "must be 'running_median', 'batch_"),
        ({"temperature": None}, ValueError, "'batch_median' or a positive float, got None"),
        ({"temperature": -1.0}, ValueError, "'batch_median' or a positive float, got -1.0"),
        ({"temperature": np.inf}, ValueError, "'batch_median' or a positive float, got inf"),
        ({"temperature": True}, ValueError, "'batch_median' or a positive float, got True"),
        ({"window": 0}, ValueError, "window must be an integer >= 1, got 0"),
        ({"seed": -1}, ValueError, "seed must be an integer >= 0, got -1"),
        ({"missing": "drop"}, ValueError, "missing must be 'raise' or 'zero'"),
        ({"layout": "both"}, ValueError, "layout must be"),
        ({"resample": True, "layout": "triple"}, ValueError, "layout='triple' and key='weight' wo"),
        ({"resample": True, "key": "w"}, ValueError, "resample=True yields samples without a weig"),
        ({"rank": 1}, ValueError, "rank must lie between 0 and num_replicas - 1 = 0, got 1"),
    ],
)
def test_bad_input_is_refused(options, error, message):
    with pytest.raises(error, match=message):
        build(**options)


def test_a_scorer_must_score():
    with pytest.raises(TypeError, match="scorer must be a LossScorer, got Linear"):
        FlowWeightedIterable([1], nn.Linear(2, 2))


@pytest.mark.parametrize("known", ["name", "any", "none"])
def test_a_scorer_that_can_share_its_work_is_told_not_to(known):
    options_of_calls = []
    losses = torch.tensor([loss_of(index) for index in range(COUNT)])

    def answer(window, options):
        options_of_calls.append(options)
        return Scores(losses[window])

    class Named:
        def score(self, window, *, shared=True, collate_fn=None, dataset_id=None):
            return answer(window, {"shared": shared})

    class Any:
        def score(self, window, **options):
            return answer(window, {"shared": options["shared"]})

    class Alone:
        def score(self, window, *, collate_fn=None, dataset_id=None):
            return answer(window, {})

    scorer = {"name": Named, "any": Any, "none": Alone}[known]()
    weights = [weight.item() for _, weight in FlowWeightedIterable(range(COUNT), scorer, window=8)]
    assert weights == pytest.approx([weight for _, weight in plain(build())], rel=1e-4)
    assert options_of_calls == [{} if known == "none" else {"shared": False}] * len(windows())


def test_a_state_that_is_none_is_named():
    with pytest.raises(TypeError, match=r"must be what FlowWeightedIterable\.state_dict returned"):
        build().load_state_dict(None)


# Ranks.


def test_the_running_median_is_merged_over_ranks_on_request(tmp_path):
    command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
    command += ["--nproc-per-node=2", __file__, str(tmp_path)]
    root = str(Path(__file__).parent.parent)
    process = subprocess.run(
        command, capture_output=True, text=True, timeout=120, env={**os.environ, "PYTHONPATH": root}
    )
    assert process.returncode == 0, process.stderr[-3000:]
    ranks = [json.loads((tmp_path / f"{rank}.json").read_text()) for rank in range(2)]
    for rank, (before, after) in enumerate(ranks):
        mine = [range(rank, 2 * WINDOW, 2), range(2 * WINDOW + rank, 4 * WINDOW, 2)]
        others = [loss_of(i) for i in range(1 - rank, 4 * WINDOW, 2)]
        assert before == pytest.approx(reference.running_median_weights(mine, loss_of), rel=0.01)
        next_window = [loss_of(i) for i in range(4 * WINDOW + rank, COUNT, 2)][:WINDOW]
        losses = [loss_of(i) for window in mine for i in window] + others + next_window
        expected = reference.flow_weights(next_window, reference.median(losses))
        assert after == pytest.approx(expected, rel=0.01)


def main():
    """One rank of the test above: two windows alone, a merger, one window more."""
    import torch.distributed as dist

    dist.init_process_group("gloo")
    rank = dist.get_rank()
    stream = build(num_replicas=2, rank=rank)
    iterator = iter(stream)
    before = [weight.item() for _, weight in islice(iterator, 2 * WINDOW)]
    stream.merge_ranks()
    after = [weight.item() for _, weight in islice(iterator, WINDOW)]
    Path(sys.argv[1], f"{rank}.json").write_text(json.dumps([before, after]))
    leave_ranks()


if __name__ == "__main__":
    main()


def test_a_temperature_of_an_ess_rule_weighs_relative_to_its_smallest_loss(tmp_path):
    losses = [loss_of(index) for index in range(COUNT)]
    temperature = resolve_temperature(losses, "ess0.5")
    expected = reference.relative_flow_weights(losses, temperature)
    stream = build(temperature=temperature)
    items = plain(islice(stream, 11))
    torch.save(stream.state_dict(), tmp_path / "state.pt")  # in the middle of a window
    other = build(temperature=temperature)
    other.load_state_dict(torch.load(tmp_path / "state.pt", weights_only=True))
    items += plain(other)
    assert [weight for _, weight in items] == pytest.approx(expected, rel=1e-4)


def test_weights_that_vanish_are_warned_of_once_with_a_rule_for_streams(caplog):
    stream = build(temperature=1e-3)
    for _ in range(2):
        list(stream)
    guess, record = caplog.records  # the first one is on the model, which is random
    assert "no better than a guess" in guess.message
    assert "temperature=0.001: the weights of the 8 samples of the stream's" in record.message
    assert "pass temperature='running_median', whose weights do not vanish" in record.message
    caplog.clear()
    list(build())
    assert "vanish" not in caplog.text


def test_a_callable_is_no_temperature_of_a_stream():
    with pytest.raises(ValueError, match="temperature of a stream must be"):
        build(temperature=lambda losses: losses.mean())
