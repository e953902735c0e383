"""Ranks without the wait for their imports: processes forked from one that has imported all.

Run as a program (`python -m tests.…`), so that no thread of torch's is alive when it forks.
"""

import json
import os
import signal
import socket
import sys
import tempfile
import time
import traceback
from pathlib import Path

import torch
import torch.distributed as dist

os.environ.setdefault("GLOO_SOCKET_IFNAME", "lo")
TIMEOUT = 120  # seconds


def start(size, work, *arguments):
    """Fork `size` ranks of a process group that run ``work(rank, *arguments)``.

    Returns their pids and the folder in which each leaves its result, RANK.json.
    """
    folder = Path(tempfile.mkdtemp())
    port = free_port()
    sys.stdout.flush()
    pids = []
    for rank in range(size):
        pid = os.fork()
        if pid == 0:
            code = 1
            try:
                _join(rank, size, port)
                answer = work(rank, *arguments)
                (folder / f"{rank}.json").write_text(json.dumps(answer))
                if size > 1:
                    dist.destroy_process_group()
                code = 0
            except BaseException:
                (folder / f"{rank}.txt").write_text(traceback.format_exc())
            finally:
                os._exit(code)
        pids.append(pid)
    return pids, folder


def finish(pids, folder):
    """Wait for ranks and return what each of them answered; raise what one of them raised."""
    deadline = time.monotonic() + TIMEOUT
    left = dict(enumerate(pids))
    while left and time.monotonic() < deadline:
        for rank, pid in list(left.items()):
            done, _ = os.waitpid(pid, os.WNOHANG)
            if done:
                del left[rank]
        time.sleep(0.005)
    for pid in left.values():
        os.kill(pid, signal.SIGKILL)
        os.waitpid(pid, 0)
    failed = [file.read_text() for file in sorted(folder.glob("*.txt"))]
    if left or failed:
        raise RuntimeError(f"ranks {sorted(left)} did not end in time; " + "\n".join(failed))
    return [json.loads((folder / f"{rank}.json").read_text()) for rank in range(len(pids))]


def in_ranks(size, work, *arguments):
    """Return what `size` ranks answer."""
    return finish(*start(size, work, *arguments))


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def _join(rank, size, port):
    if size > 1:
        dist.init_process_group(
            "gloo", init_method=f"tcp://127.0.0.1:{port}", rank=rank, world_size=size
        )


def bits(scores):
    """All numbers of scores, exactly."""
    return {
        "loss": scores.losses.view(torch.int32).tolist(),
        "count": scores.counts.tolist(),
        "token_loss": None
        if scores.flat_token_losses is None
        else scores.flat_token_losses.view(torch.int32).tolist(),
        "weights": scores.weights(missing="zero").view(torch.int32).tolist(),
    }
