import itertools
import json
import subprocess
import sys
import threading
import time
from pathlib import Path

import pytest
import torch.distributed as dist

from flowdata.errors import RankError
from flowdata.scoring.ranks import Ranks
from tests.rank_checks import CHECKS

ROOT = Path(__file__).parent.parent


@pytest.fixture(scope="module")
def outcomes():
    """Of all checks, from one process that imports once and forks ranks."""
    done = subprocess.run(
        [sys.executable, "-m", "tests.rank_checks"],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


@pytest.mark.parametrize("check", [check.__name__ for check in CHECKS])
def test_ranks(check, outcomes):
    assert outcomes[check] == ""


# --- the talk over a board, ranks being threads --------------------------------------------------


def together(size, work):
    """What `work(ranks)` returns, or raises, in as many threads as ranks."""
    board, results = dist.HashStore(), [None] * size

    def run(rank):
        ranks = Ranks(board, rank, size)
        try:
            with ranks.failing_together():
                results[rank] = work(ranks)
        except Exception as error:
            results[rank] = error

    threads = [threading.Thread(target=run, args=(rank,)) for rank in range(size)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(30)
    assert not any(thread.is_alive() for thread in threads)
    return results


@pytest.mark.parametrize("ahead", [False, True])
@pytest.mark.parametrize("size", [1, 2, 7])
def test_every_pack_is_claimed_once(size, ahead):
    def work(ranks):
        begun, held = [], []
        claims = ranks.claims(range(1, 101), ahead=ahead)
        for pack in claims:
            held.append(pack)
            if len(held) > (3 if ahead else 0):  # claimed well before it is begun
                begun += [p for p in [held.pop(0)] if claims.begins(p)]
        return begun + [p for p in held if claims.begins(p)]

    assert sorted(itertools.chain(*together(size, work))) == list(range(1, 101))


def test_what_a_slow_rank_has_not_begun_is_taken_over():
    slow_holds = threading.Event()

    def work(ranks):
        claims = ranks.claims(range(10), ahead=True)
        if ranks.rank == 0:
            held = list(itertools.islice(claims, 6))
            slow_holds.set()
            time.sleep(0.5)
            return [pack for pack in held if claims.begins(pack)]
        slow_holds.wait()
        return [pack for pack in claims if claims.begins(pack)]

    slow, fast = together(2, work)
    assert slow == []
    assert sorted(fast) == list(range(10))


def test_one_ranks_error_reaches_those_that_wait():
    def work(ranks):
        if ranks.rank == 1:
            raise KeyError("lost")
        return ranks.gather("values", ranks.rank)

    first, second, third = together(3, work)
    assert isinstance(second, KeyError)
    for other in (first, third):
        assert isinstance(other, RankError)
        assert "rank 1: KeyError: 'lost'" in str(other)


def test_what_ranks_tell_each_other():
    def work(ranks):
        told = ranks.gather("numbers", {"n": ranks.rank}), ranks.from_first("word", str(ranks.rank))
        ranks.leave()
        return told

    assert together(3, work) == [([{"n": 0}, {"n": 1}, {"n": 2}], "0")] * 3


def test_a_long_wait_says_what_is_missing(monkeypatch, caplog):
    monkeypatch.setattr("flowdata.scoring.ranks._TELL_AFTER", 0.05)

    def work(ranks):
        if ranks.rank == 1:
            time.sleep(0.5)
        return ranks.gather("identity", 1)

    together(2, work)
    assert "waiting for 'identity/1' of the other ranks" in caplog.text
    assert "shared=False" in caplog.text


def test_a_rank_that_is_gone_is_named(monkeypatch):
    monkeypatch.setattr("flowdata.scoring.signs_of_life._SILENT", 0.5)
    board = dist.HashStore()
    board.add("alive/1", 1)  # the one sign of life of a rank that was killed, and left no error
    with pytest.raises(RankError, match=r"rank 1 has shown no sign of life .* goes on from what"):
        Ranks(board, 0, 2).gather("done", True)


def test_a_slow_rank_is_waited_for_as_long_as_it_lives(monkeypatch):
    monkeypatch.setattr("flowdata.scoring.signs_of_life._BEAT", 0.05)
    monkeypatch.setattr("flowdata.scoring.signs_of_life._SILENT", 0.5)

    def work(ranks):
        if ranks.rank == 1:
            time.sleep(1.5)
        return ranks.gather("done", ranks.rank)

    assert together(2, work) == [[0, 1]] * 2
    assert not [thread for thread in threading.enumerate() if "signs of life" in thread.name]
