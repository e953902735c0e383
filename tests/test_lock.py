import json
import os
import signal
import subprocess
import sys
import threading
import time
from contextlib import suppress

import pytest

from flowdata.store import lock as locks
from flowdata.store.lock import lock


@pytest.fixture
def path(tmp_path):
    return tmp_path / ".lock"


@pytest.fixture
def quick(monkeypatch):
    """Heartbeats and their limit, in fractions of a second."""
    monkeypatch.setattr(locks, "BEAT", 0.1)
    monkeypatch.setattr(locks, "STALE", 0.8)
    monkeypatch.setattr(locks, "_POLL", 0.02)


def foreign(path, **changed):
    """The lock of a process on another host."""
    holder = {"host": "elsewhere", "pid": 1, "born": "5", "id": "a"} | changed
    path.write_text(json.dumps(holder))


def seconds_to_take(path):
    begun = time.monotonic()
    with lock(path, "scoring"):
        return time.monotonic() - begun


def test_the_second_of_two_waits(path, caplog):
    order = []

    def second():
        with lock(path, "scoring into s"):
            order.append("second")

    with lock(path, "scoring into s"):
        thread = threading.Thread(target=second)
        thread.start()
        thread.join(0.6)
        order.append("first")
    thread.join()
    assert order == ["first", "second"]
    assert caplog.text.count("another process is scoring into s; waiting for it to end") == 1
    assert not path.exists()


def test_only_one_of_many_has_it_at_a_time(path, quick):
    inside, most, done = [], [], []

    def work():
        for _ in range(5):
            with lock(path, "scoring"):
                inside.append(1)
                most.append(len(inside))
                time.sleep(0.002)
                inside.pop()
        done.append(1)

    threads = [threading.Thread(target=work) for _ in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert max(most) == 1
    assert len(done) == 6


def test_a_killed_process_of_this_host_loses_it_at_once(path, caplog):
    code = (
        "import sys, time, pathlib; from flowdata.store.lock import lock\n"
        "with lock(pathlib.Path(sys.argv[1]), 'scoring'): print('held', flush=True); time.sleep(60)"
    )
    holder = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    assert holder.stdout.readline() == b"held\n"
    holder.send_signal(signal.SIGKILL)
    holder.wait()
    assert path.exists()
    assert seconds_to_take(path) < 1
    assert "from a process that is gone" in caplog.text


def test_a_later_process_of_the_same_number_is_not_the_holder(path):
    mine = {"host": locks._host(), "pid": os.getpid(), "id": "a"}
    path.write_text(json.dumps({**mine, "born": "1"}))
    assert seconds_to_take(path) < 1


def test_another_hosts_lock_is_taken_once_nobody_touches_it(path, quick):
    foreign(path)
    os.utime(path, (0, 0))  # how old it says it is does not matter: clocks differ
    assert seconds_to_take(path) >= 0.8

    foreign(path)
    stop = threading.Event()
    beats = threading.Thread(target=locks._beat, args=(path, path.read_bytes(), stop))
    beats.start()
    timer = threading.Timer(1.6, stop.set)
    timer.start()
    assert seconds_to_take(path) >= 1.6
    beats.join()


@pytest.mark.parametrize(
    "content",
    [b"", b"{", b"[]", b'{"host": 1}', b"\xff\x00", b'{"pid": "x", "host": "", "born": 1}'],
)
def test_a_lock_that_says_nothing_is_stale_in_time(path, quick, content):
    path.write_bytes(content)
    assert seconds_to_take(path) >= 0.8


def test_the_holder_keeps_it_alive(path, quick):
    with lock(path, "scoring"):
        before = path.stat().st_mtime_ns
        time.sleep(0.4)
        assert path.stat().st_mtime_ns > before


def test_a_fresh_lock_is_put_back_by_one_who_took_it_for_stale(path):
    foreign(path, id="fresh")
    locks._break(path, b"the stale one")
    assert json.loads(path.read_text())["id"] == "fresh"
    locks._break(path, path.read_bytes())
    assert list(path.parent.iterdir()) == []
    locks._break(path, b"gone by now")


def test_a_lock_lost_to_another_is_left_to_it(path):
    with suppress(FileNotFoundError), lock(path, "scoring"):
        foreign(path, id="theirs")
    assert json.loads(path.read_text())["id"] == "theirs"
