"""The run's pipeline: what is loaded how, started and finished when, and said of errors."""

from types import SimpleNamespace

import pytest
import torch

from flowdata.scoring import run
from flowdata.scoring.plan.packs import plan_fixed
from flowdata.scoring.ranks import one_rank


@pytest.mark.parametrize(("device", "pinned"), [("cpu", False), ("cuda", True)])
def test_batches_for_a_gpu_are_read_into_pinned_memory(monkeypatch, device, pinned):
    options = {}

    def loader(*arguments, **named):
        options.update(named)
        return []

    monkeypatch.setattr(run, "DataLoader", loader)
    job = SimpleNamespace(dataset=[], collate=list, num_workers=0, device=torch.device(device))
    assert list(run._load_batches(job, iter([]))) == []
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
    share = run._Share(job, plan, [3, 0, 4], one_rank())
    behind = [(number, batch.content, share.packs_behind()) for number, batch in share.batches()]
    assert behind == [(3, [6, 7], 1), (0, [0, 1], 2), (4, [8], 3)]


def test_an_error_names_the_samples_of_its_pack():
    with (
        pytest.raises(KeyError, match=r"lost \(while scoring samples 0, 1, 2, 3, 4, …\)"),
        run._naming_samples(plan_fixed(9, batch_size=7), 0),
    ):
        raise KeyError("lost")
    with (
        pytest.raises(OSError, match=r"lost \(while scoring samples 7, 8\)"),
        run._naming_samples(plan_fixed(9, batch_size=7), 1),
    ):
        raise OSError("lost")
