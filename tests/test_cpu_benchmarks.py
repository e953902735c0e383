"""The benchmarks of a CPU: real quotas, what comes before the first pack, the passes of a layer."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from benchmarks import busy, passes, rows, start_up
from benchmarks.scoring.cases import Case

CPUS = "from flowdata._common.cpus import usable_cpus; print(usable_cpus())"


def can_make_groups():
    return any(os.access(mount, os.W_OK) for mount in busy._GROUPS) and os.geteuid() == 0


@pytest.mark.skipif(not can_make_groups(), reason="control groups take root and a writable mount")
@pytest.mark.skipif((os.cpu_count() or 1) < 2, reason="a quota of one CPU limits two or more")
@pytest.mark.parametrize(("cpus", "usable"), [(0.5, "1"), (1, "1"), (1.5, "2")])
def test_the_library_reads_the_quota_of_a_real_control_group(cpus, usable):
    try:
        with busy.quota(cpus) as before:
            group = before[2].split()[3].removesuffix("/cgroup.procs")
            command = [*before, sys.executable, "-c", CPUS]
            output = subprocess.run(command, check=True, capture_output=True, text=True).stdout
    except OSError as error:
        pytest.skip(f"this system lets nobody set a quota: {error}")
    assert output.strip() == usable
    assert not Path(group).exists()


def test_start_up_ends_before_the_first_pack(monkeypatch, tmp_path):
    monkeypatch.setattr(rows, "RESULTS", tmp_path)
    small = Case(width=192, layers=2, vocabulary=512)
    monkeypatch.setattr(start_up, "CASES", {"gsm8k": small})
    start_up.main(["--samples", "12", "--repeats", "2"])
    (run,) = json.loads((tmp_path / "start_up.json").read_text())
    (row,) = run["rows"]
    assert row["what"] == "12 samples: before the first pack"
    assert 0 < row["spread"][0] <= row["median"]
    assert 0.05 < row["share_of_check"] < 1


@pytest.mark.parametrize("part", [passes.norms, passes.rotations, passes.swiglu])
def test_fewer_passes_give_what_is_written(part):
    ways = part(64, torch.float32)
    with torch.no_grad():
        written, fewer = (passes.flat(ways[way]()) for way in (passes.WRITTEN, passes.FEWER))
    torch.testing.assert_close(fewer, written, atol=1e-5, rtol=1e-5)
