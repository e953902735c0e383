"""CPUs: affinity, and the quotas of control groups of both versions."""

import os

import pytest

from flowdata._common.cpus import usable_cpus

V2, V1 = "0::{}\n", "4:memory:/\n3:cpu,cpuacct:{}\n0::/\n"


def system(root, groups, files):
    """A tree of files as the kernel shows them."""
    for name, text in {"proc/self/cgroup": groups, **files}.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text)
    return root


@pytest.fixture(autouse=True)
def sixteen_cores(monkeypatch):
    monkeypatch.setattr(os, "sched_getaffinity", lambda process: set(range(16)), raising=False)


@pytest.mark.parametrize(
    ("groups", "files", "cpus"),
    [
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "200000 100000\n"}, 2),
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "max 100000\n"}, 16),
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "350000 100000\n"}, 4),
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "149000 100000\n"}, 1),
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "50000 100000\n"}, 1),  # half a CPU
        (V2.format("/"), {"sys/fs/cgroup/cpu.max": "what?\n"}, 16),
        (V2.format("/"), {}, 16),
        # A group within a group has the lesser quota, whichever has it.
        (
            V2.format("/pod/box"),
            {
                "sys/fs/cgroup/pod/cpu.max": "400000 100000",
                "sys/fs/cgroup/pod/box/cpu.max": "max 100000",
            },
            4,
        ),
        # A container that sees its group's own name, whose folder is mounted as the root.
        (V2.format("/docker/1f"), {"sys/fs/cgroup/cpu.max": "300000 100000"}, 3),
        (
            V1.format("/"),
            {
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_quota_us": "250000\n",
                "sys/fs/cgroup/cpu,cpuacct/cpu.cfs_period_us": "50000\n",
            },
            5,
        ),
        (
            V1.format("/docker/1f"),
            {
                "sys/fs/cgroup/cpu/cpu.cfs_quota_us": "-1\n",
                "sys/fs/cgroup/cpu/cpu.cfs_period_us": "100000\n",
            },
            16,
        ),
        ("", {}, 16),
    ],
)
def test_a_quota_allows_as_many_cpus_as_it_is_nearest_to(tmp_path, groups, files, cpus):
    assert usable_cpus(system(tmp_path, groups, files)) == cpus


def test_a_quota_above_the_affinity_allows_no_more(tmp_path):
    files = {"sys/fs/cgroup/cpu.max": "6400000 100000"}
    assert usable_cpus(system(tmp_path, V2.format("/"), files)) == 16


def test_a_system_without_these_files_has_no_quota(tmp_path):
    assert usable_cpus(tmp_path) == 16


def test_this_process_may_use_its_own_affinity(monkeypatch):
    monkeypatch.undo()
    assert 1 <= usable_cpus() <= os.cpu_count()
