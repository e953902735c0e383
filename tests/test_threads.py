"""Threads: the fewest of those as fast are taken, and what the user has set is kept."""

import time

import pytest
import torch

from flowdata import LossScorer
from flowdata.scoring import threads
from flowdata.scoring.threads import choose_threads, describe_threads
from tests.models import TinyResNet

CPU = torch.device("cpu")


@pytest.fixture(autouse=True)
def four_threads_unset(monkeypatch):
    """Four threads of PyTorch's own choice on four free cores."""
    monkeypatch.delenv("OMP_NUM_THREADS", raising=False)
    monkeypatch.setattr(threads, "usable_cpus", lambda: 4)
    before = torch.get_num_threads()
    torch.set_num_threads(4)
    threads._fastest.cache_clear()
    yield
    torch.set_num_threads(before)
    threads._fastest.cache_clear()


def takes(monkeypatch, seconds):
    """Let the work that is measured take so many seconds with so many threads; return its calls."""
    calls = []

    def work():
        calls.append(torch.get_num_threads())
        time.sleep(seconds[calls[-1]])

    monkeypatch.setattr(threads, "_layer_like", lambda dtype: work)
    return calls


@pytest.mark.parametrize(
    ("seconds", "number"),
    [
        ({1: 0.008, 2: 0.004, 4: 0.002}, 4),
        ({1: 0.008, 2: 0.004, 4: 0.006}, 2),
        ({1: 0.004, 2: 0.02, 4: 0.04}, 1),
        ({1: 0.03, 2: 0.01, 4: 0.01}, 2),  # of two that are as fast, the fewer
    ],
)
def test_the_fewest_threads_of_those_as_fast_are_taken(monkeypatch, seconds, number):
    takes(monkeypatch, seconds)
    assert choose_threads(torch.float32, CPU) == number
    assert torch.get_num_threads() == 4


def test_a_hopeless_number_is_measured_once(monkeypatch):
    calls = takes(monkeypatch, {1: 0.004, 2: 0.2, 4: 0.3})
    assert choose_threads(torch.float32, CPU) == 1
    assert calls.count(2) == calls.count(4) == 2  # once to start the threads


def test_the_machine_is_measured_once_for_the_process(monkeypatch):
    calls = takes(monkeypatch, {1: 0.004, 2: 0.002, 4: 0.001})
    choose_threads(torch.float32, CPU)
    before = len(calls)
    choose_threads(torch.float32, CPU)
    assert len(calls) == before


def test_what_the_user_has_set_is_kept(monkeypatch):
    calls = takes(monkeypatch, {1: 0.001, 2: 0.01, 4: 0.01})
    monkeypatch.setenv("OMP_NUM_THREADS", "4")
    assert choose_threads(torch.float32, CPU) == 4
    monkeypatch.delenv("OMP_NUM_THREADS")
    torch.set_num_threads(1)
    assert choose_threads(torch.float32, CPU) == 1
    assert choose_threads(torch.float32, torch.device("cuda")) == 1
    assert not calls


def test_no_more_threads_than_cpus_are_tried(monkeypatch):
    calls = takes(monkeypatch, {1: 0.008, 2: 0.004})
    monkeypatch.setattr(threads, "usable_cpus", lambda: 2)
    assert choose_threads(torch.float32, CPU) == 2
    assert set(calls) == {1, 2}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_real_work_gives_one_of_the_numbers(dtype):
    assert choose_threads(dtype, CPU) in (1, 2, 4)


def test_a_run_takes_the_number_says_it_and_gives_it_back(monkeypatch, tmp_path):
    takes(monkeypatch, {1: 0.001, 2: 0.01, 4: 0.01})
    numbers = set()

    def loss(model, batch):
        numbers.add(torch.get_num_threads())
        return torch.nn.functional.cross_entropy(model(batch[0]), batch[1], reduction="none")

    images = [(torch.randn(3, 8, 8), index % 4) for index in range(8)]
    scorer = LossScorer(TinyResNet(), loss, progress=False)
    scores = scorer.score(images, store=tmp_path)
    assert numbers == {1}
    assert scores.metadata["plan"]["threads"] == 1
    assert "threads: 1 instead of 4, chosen for speed; " in scorer.explain()
    assert torch.get_num_threads() == 4


@pytest.mark.parametrize(
    ("number", "cpus", "said"),
    [
        (4, 8, "threads: 4"),
        (4, 2, "threads: 4"),  # set by the user
        (2, 2, "threads: 2 instead of 4, one for each CPU that this process may use"),
        (1, 2, "threads: 1 instead of 4, chosen for speed"),
    ],
)
def test_the_number_and_its_reason_are_said(number, cpus, said, monkeypatch):
    monkeypatch.setattr(threads, "usable_cpus", lambda: cpus)
    assert describe_threads(number, CPU, goes_on=False) == said
    assert not describe_threads(number, torch.device("cuda"), goes_on=False)


def test_a_number_that_was_chosen_elsewhere_says_where():
    said = describe_threads(8, CPU, goes_on=False)  # of a store whose parts are all damaged
    assert said.startswith("threads: 8 instead of 4, as when the store was begun")
    of_rank_1 = describe_threads(2, CPU, goes_on=False, is_first=False)
    assert of_rank_1 == "threads: 2 instead of 4, as rank 0 chose"
