"""Scoring with less than a machine: python -m benchmarks busy [--others 0 1 2] [--quotas 0.5 1] …

Other processes multiply matrices without end while `flowdata bench` runs in a process of its own:
the usual loop, with PyTorch's own number of threads, and scoring take turns, after their losses
have been compared. Each repeat is a new process, since the number of threads is chosen once in one.
With quotas, which root alone can set, that process runs in a control group with the time of so many
CPUs, as a container does; `--others` without numbers measures these alone.
"""

from __future__ import annotations

import argparse
import json
import math
import os
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from benchmarks import rows

# Where control groups that share out CPUs lie: version 1, version 2.
_GROUPS = Path("/sys/fs/cgroup/cpu"), Path("/sys/fs/cgroup")
_LEAST = 0.01  # CPUs of a quota
_OTHER = """
import torch
torch.set_num_threads(1)
matrix = torch.ones(768, 768)
while True:
    matrix @ matrix
"""


@contextmanager
def others(count: int) -> Iterator[None]:
    """Let a number of processes compute, each with one thread, for a block."""
    processes = [subprocess.Popen([sys.executable, "-c", _OTHER]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


@contextmanager
def quota(cpus: float) -> Iterator[list[str]]:
    """Make a control group with the time of some CPUs, for a block.

    Gives the words before a command that is to run in it.
    """
    group = _group(round(1e5 * cpus))
    try:
        yield ["sh", "-c", f'echo $$ > {group}/cgroup.procs && exec "$@"', "in-group"]
    finally:
        group.rmdir()


def _group(microseconds: int) -> Path:
    """A new control group with a quota of so many microseconds in each 100 ms."""
    mount = next((path for path in _GROUPS if path.exists()), _GROUPS[-1])
    try:
        group = Path(tempfile.mkdtemp(prefix="flowdata-", dir=mount))
    except OSError as error:
        raise SystemExit(f"--quotas takes root, and control groups in {mount}: {error}") from error
    try:
        if (group / "cpu.max").exists():
            (group / "cpu.max").write_text(f"{microseconds} 100000")
        else:
            (group / "cpu.cfs_quota_us").write_text(str(microseconds))
    except OSError as error:
        group.rmdir()
        raise SystemExit(f"--quotas: {mount} shares out no CPUs: {error}") from error
    return group


def bench(samples: int, before: Sequence[str] = ()) -> dict[str, float]:
    """Return the figures of `flowdata bench`, in which each loop has the threads it takes unasked.

    Args:
        samples: how many are scored.
        before: the words before the command.
    """
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [*before, sys.executable, "-m", "flowdata", "bench", "--json", f"--samples={samples}"]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    figures: dict[str, float] = json.loads(output)
    if figures["largest_difference"] > 0.1:  # nats; bfloat16's rounding is a few hundredths
        sys.exit(f"the two loops differ by {figures['largest_difference']} nats")
    return figures


def main(argv: Sequence[str]) -> None:
    """Measure beside each number of other processes and with each quota; write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks busy", description=__doc__)
    parser.add_argument("--others", nargs="*", type=int, default=[0, 1, 2], help="processes")
    parser.add_argument("--quotas", nargs="*", type=float, default=[], help="CPUs; needs root")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args(argv)
    if not all(_LEAST <= cpus < math.inf for cpus in options.quotas):
        parser.error(f"--quotas takes numbers of CPUs, {_LEAST} or more: the kernel gives no less")
    results = []
    for count in options.others:
        with others(count):
            figures = [bench(options.samples) for _ in range(options.repeats)]
        results += list(rows_of(figures, f"beside {count} others"))
    for cpus in options.quotas:
        with quota(cpus) as before:
            figures = [bench(options.samples, before) for _ in range(options.repeats)]
        results += list(rows_of(figures, f"with {cpus:g} CPUs"))
    print(rows.write("busy", results, " ".join(["python -m benchmarks busy", *argv])))


def rows_of(figures: Sequence[dict[str, float]], where: str) -> Iterator[dict[str, Any]]:
    """Yield the rows of some repeats, and print them."""
    for what, unit in {"usual_loop": "tokens/s", "flowdata": "tokens/s", "ratio": "×"}.items():
        values = [each[what] for each in figures]
        result = rows.row(f"{what}, {where}", values, unit, worst=min(values))
        print(rows.line(result), flush=True)
        yield result
