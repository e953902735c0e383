"""Time and peak memory on a device, once its work is done."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from time import perf_counter

import torch


def now(device: str) -> float:
    """Return the time in seconds, when the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter()


def peak_memory(run: Callable[[], object], device: str) -> float:
    """Return the MiB that a call adds at its highest to the memory that is held before it."""
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    Path("/proc/self/clear_refs").write_text("5")  # Linux: the peak becomes what is held now
    held = _status("VmRSS")
    run()
    return (_status("VmHWM") - held) / 2**10


def _status(name: str) -> int:
    """Return a field of Linux's status of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return int(next(line for line in lines if line.startswith(name)).split()[1])
