"""The benchmarks of a CPU: real quotas, what comes before the first pack, the passes of a layer."""

import logging
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import busy, passes, start_up
from benchmarks.scoring.cases import Case

CPUS = "from flowdata._common.cpus import usable_cpus; print(usable_cpus())"


@pytest.fixture
def quotas_can_be_set():
    try:
        with busy.quota(1):
            pass
    except SystemExit as error:
        pytest.skip(str(error))


@pytest.mark.usefixtures("quotas_can_be_set")
@pytest.mark.parametrize(("cpus", "usable"), [(0.5, 1), (1, 1), (1.5, 2)])
def test_the_library_reads_the_quota_of_a_real_control_group(cpus, usable):
    with busy.quota(cpus) as before:
        command = [*before, sys.executable, "-c", CPUS]
        output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    assert int(output) == min(usable, len(os.sched_getaffinity(0)))
    group = re.search(r"> (\S+)/cgroup.procs", before[2])[1]
    assert not Path(group).exists()


@pytest.mark.parametrize("quota", ["0", "-1", "nan", "inf", "0.001"])
def test_a_quota_that_the_kernel_would_take_for_none_is_refused(quota, capsys):
    with pytest.raises(SystemExit):
        busy.main(["--others", "--quotas", quota])
    assert "--quotas takes numbers of CPUs, 0.01 or more" in capsys.readouterr().err


def test_a_place_without_control_groups_is_named(monkeypatch, tmp_path):
    monkeypatch.setattr(busy, "_GROUPS", (tmp_path / "cpu", tmp_path / "nowhere"))
    with pytest.raises(SystemExit, match=r"takes root, and control groups in .*nowhere"):
        busy.main(["--others", "--quotas", "1"])


def test_start_up_ends_before_the_first_pack(monkeypatch):
    monkeypatch.setattr(start_up, "CASES", {"gsm8k": Case(width=192, layers=2, vocabulary=512)})
    first, again, share = start_up.measure(12)
    assert min(first, again) > 0
    assert 0.05 < share < 1
    assert not logging.getLogger("flowdata").isEnabledFor(logging.DEBUG)


@pytest.mark.parametrize("part", [passes.norms, passes.rotations, passes.swiglu])
def test_fewer_passes_give_what_is_written(part):
    ways = part(64, torch.float32)
    with torch.no_grad():
        written, fewer = (passes.flat(ways[way]()) for way in (passes.WRITTEN, passes.FEWER))
    torch.testing.assert_close(fewer, written, atol=1e-5, rtol=1e-5)
