"""CPUs: how many this process may use at once, by its affinity and by its container's quota.

PyTorch starts a thread for each core of the machine. A container may be given the time of fewer,
which the kernel keeps in the files of a control group (cgroup):

    version 2    <group>/cpu.max              "200000 100000": 200 ms in each 100 ms, two CPUs
    version 1    <group>/cpu.cfs_quota_us     200000, or -1 for no quota
                 <group>/cpu.cfs_period_us    100000

A group has the least quota of its own and of all groups above it.
"""

from __future__ import annotations

import math
import os
from collections.abc import Iterator
from pathlib import Path

_ROOT = Path("/")


def usable_cpus(root: Path = _ROOT) -> int:
    """Return how many CPUs this process may use at once, a half rounded up, 1 or more.

    Args:
        root: of the files ``proc`` and ``sys``; other systems than Linux have none and no quota.
    """
    affinity = getattr(os, "sched_getaffinity", None)
    cpus = len(affinity(0)) if affinity else os.cpu_count() or 1
    quotas = [quota for folder in _groups(root) if (quota := _quota(folder)) is not None]
    # A half is rounded up: with the time of 1.5 CPUs, two threads, which the kernel stops together
    # once it is used up, score 1.3 times as fast as one thread, which can use one CPU at most
    # (`python -m benchmarks busy --quotas 1 1.5`).
    return max(1, math.floor(min([cpus, *quotas]) + 0.5))


def _groups(root: Path) -> Iterator[Path]:
    """The folders that may hold a quota of this process: its groups, and all groups above them."""
    try:
        lines = (root / "proc/self/cgroup").read_text().splitlines()
    except OSError:
        return
    mounts = root / "sys/fs/cgroup"
    for line in lines:
        number, controllers, group = line.split(":", 2)  # such as 4:cpu,cpuacct:/docker/1f
        if number != "0" and "cpu" not in controllers.split(","):
            continue
        names = ("", "unified") if number == "0" else (controllers, "cpu")
        for mount in (mounts / name for name in names):
            folder = mount / group.lstrip("/")
            yield from [folder, *(each for each in folder.parents if each.is_relative_to(mount))]


def _quota(folder: Path) -> float | None:
    """A group's own quota in CPUs, None if it has none."""
    try:
        if (folder / "cpu.max").exists():
            quota, period = (folder / "cpu.max").read_text().split()
        else:
            quota, period = (
                (folder / f"cpu.cfs_{name}_us").read_text().strip() for name in ("quota", "period")
            )
        return None if quota in ("max", "-1") else int(quota) / int(period)
    except (OSError, ValueError):  # no such folder, or a file that says something else
        return None
