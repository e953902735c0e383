"""Ranks in tests that import once: cases under one launcher, and processes of one server."""

import gc
import multiprocessing
import os
import socket
import subprocess
import sys
import time
from pathlib import Path

import torch

from tests.leave_ranks import leave_ranks

TORCHRUN = ("torch.distributed.run", "--standalone", "--nproc-per-node=2")


def launch(module, folder, cases, launcher=TORCHRUN):
    """Run a module that hands its arguments to `run_cases`."""
    process = subprocess.run(
        [sys.executable, "-m", *launcher, "-m", module, str(folder), free_ports(cases), *cases],
        cwd=Path(__file__).parents[1],
        env={**os.environ, "OMP_NUM_THREADS": "1"},
        capture_output=True,
        text=True,
        timeout=300,
        check=False,
    )
    assert process.returncode == 0, process.stderr[-4000:]


def free_ports(cases):
    probes = [socket.socket() for _ in cases]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = ",".join(str(probe.getsockname()[1]) for probe in probes)
    for probe in probes:
        probe.close()
    return ports


def run_cases(run, folder, ports, *cases):
    """On a rank: ``run(case, folder)``, in a process of its own where there are several cases.

    Ranks of torchrun meet at its store, where what one case left would mislead the next. So those
    of several cases meet at a port of each, as they do where torchrun is told an address.
    """
    gc.collect()
    gc.freeze()  # what was imported; a Trainer collects garbage after each run
    for port, case in zip(ports.split(","), cases, strict=True):
        pid = os.fork() if len(cases) > 1 else 0
        if pid == 0:
            if len(cases) > 1:
                os.environ |= {"MASTER_PORT": port, "TORCHELASTIC_USE_AGENT_STORE": "False"}
            run(case, Path(folder))
            _meet_at_the_end(case, Path(folder))
            leave_ranks()
        if os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1]):
            sys.exit(f"the case {case!r} failed")


def _meet_at_the_end(case, folder):
    """Wait for the other ranks: the first one has the store that they leave their groups by.

    A trainer may have ended the process group already, so ranks meet by files.
    """
    (folder / f"{case}-{os.environ['RANK']}.end").touch()
    for rank in range(int(os.environ["WORLD_SIZE"])):
        wait_for(folder / f"{case}-{rank}.end")


def wait_for(file, seconds=120):
    end = time.monotonic() + seconds
    while not file.exists():
        assert time.monotonic() < end, f"no {file.name} after {seconds} s"
        time.sleep(0.02)


def start_ranks(work, arguments, count):
    """``work(rank, *arguments)`` in processes that a server forks, which has imported the tests."""
    multiprocessing.set_forkserver_preload(["tests.test_anchor_follows", "tests.test_companions"])
    options = {"nprocs": count, "start_method": "forkserver"}
    torch.multiprocessing.start_processes(work, arguments, **options)
