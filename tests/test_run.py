"""The run's pipeline: what is loaded how, started and finished when, and said of errors."""

from types import SimpleNamespace

import pytest
import torch

from flowdata.scoring import batches, run
from flowdata.scoring.grouping import alone, together
from flowdata.scoring.kinds import kind_of
from flowdata.scoring.plan.packs import plan_fixed
from flowdata.scoring.ranks import one_rank


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_read_into_pinned_memory(monkeypatch, device, pinned):
    options = {}

    def loader(*arguments, **named):
        options.update(named)
        return []

    monkeypatch.setattr(batches, "DataLoader", loader)
    job = SimpleNamespace(dataset=[], collate=list, num_workers=0, device=torch.device(device))
    assert list(batches.load_batches(job, iter([]), together, None)) == []
    assert options["pin_memory"] is pinned


@pytest.mark.parametrize(
    ("ahead", "expected"),
    [
        (0, "start 0, finish 0, start 1, finish 1, start 2, finish 2"),
        (1, "start 0, start 1, finish 0, start 2, finish 1, finish 2"),
        (9, "start 0, start 1, start 2, finish 0, finish 1, finish 2"),
    ],
)
def test_losses_are_waited_for_once_the_next_packs_are_started(ahead, expected):
    events = []

    class Pack:
        def __init__(self, number):
            self.number = number
            events.append(f"start {number}")

        def finish(self):
            events.append(f"finish {self.number}")
            return self.number

    packs = run._finish_packs((Pack(number) for number in range(3)), ahead=ahead)
    assert list(packs) == [0, 1, 2]
    assert ", ".join(events) == expected


@pytest.mark.parametrize("workers", [0, 2])
def test_progress_counts_the_packs_that_are_behind(workers):
    plan = plan_fixed(9, batch_size=2)
    job = SimpleNamespace(
        dataset=list(range(9)),
        collate=list,
        num_workers=workers,
        device=torch.device("cpu"),
        model=torch.nn.Identity(),
    )
    agreed = SimpleNamespace(grouping=together, kinds=[])
    share = run._Share(job, plan, [3, 0, 4], one_rank(), agreed)
    behind = [(number, batch.content[0], share.packs_behind()) for number, batch in share.batches()]
    assert behind == [(3, [6, 7], 1), (0, [0, 1], 2), (4, [8], 3)]


def test_an_error_names_the_samples_of_its_pack():
    with (
        pytest.raises(KeyError, match=r"lost \(while scoring samples 0, 1, 2, 3, 4, …\)"),
        run._naming_samples(None, plan_fixed(9, batch_size=7), 0),
    ):
        raise KeyError("lost")
    with (
        pytest.raises(OSError, match=r"lost \(while scoring samples 7, 8\)"),
        run._naming_samples(None, plan_fixed(9, batch_size=7), 1),
    ):
        raise OSError("lost")


def test_some_samples_are_collated_alone_as_well():
    job = SimpleNamespace(
        dataset=list(range(3000)), collate=list, num_workers=0, device=torch.device("cpu")
    )
    packs = [list(range(first, first + 100)) for first in range(0, 3000, 100)]
    few = {}
    for pack, batch in enumerate(batches.load_batches(job, iter(packs), together, [()])):
        few |= {pack * 100 + place: content for place, content in batch.alone.items()}
    assert 4 <= len(few) <= 8  # two in a thousand
    assert all(content == [index] and batches.is_drawn(index) for index, content in few.items())
    (batch,) = batches.load_batches(job, iter([[5, 6]]), alone, None)
    assert batch.content == [[5], [6]]
    assert not batch.alone


def test_the_first_sample_of_a_new_kind_is_checked():
    rows = [{"x": 1}] * 5 + [{"x": 1, "image": "a"}] * 3
    job = SimpleNamespace(dataset=rows, collate=list, num_workers=0, device=torch.device("cpu"))
    (batch,) = batches.load_batches(job, iter([list(range(8))]), together, [kind_of(rows[0])])
    assert 5 in batch.alone
    assert {6, 7}.isdisjoint(batch.alone)
