"""Rows: how every benchmark times, prints and stores, with unit, spread, machine and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import shutil
import statistics
import subprocess
from collections.abc import Callable, Mapping
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

from flowdata._common.processor import cpu

RESULTS = Path(__file__).parent / "results"


def timed(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Return the seconds of `repeats` calls, after `warmup` calls that are not timed."""
    return timed_in_turn({"": run}, repeats, warmup)[""]


def timed_in_turn(
    runs: Mapping[str, Callable[[], object]], repeats: int, warmup: int = 0
) -> dict[str, list[float]]:
    """Return the seconds of `repeats` calls of each run, after `warmup` untimed ones.

    Every turn calls all runs one after another, so that a slow moment of the machine slows all of
    them alike.
    """
    seconds: dict[str, list[float]] = {name: [] for name in runs}
    for turn in range(warmup + repeats):
        for name, run in runs.items():
            start = perf_counter()
            run()
            seconds[name] += [perf_counter() - start] * (turn >= warmup)
    return seconds


def now(device: str) -> float:
    """Return the time in seconds, once the device has finished its work."""
    if device != "cpu":
        torch.cuda.synchronize()
    return perf_counter()


def row(what: str, values: list[float], unit: str, **more: Any) -> dict[str, Any]:
    """Return one quantity: the median and the spread (smallest and largest) of its runs."""
    spread = [min(values), max(values)]
    median = statistics.median(values)
    return {"what": what, "median": median, "spread": spread, "unit": unit, **more}


def line(row: dict[str, Any]) -> str:
    """Return a row's text: its median, and then its further figures with their names."""
    common_fields = {"what", "part", "median", "spread", "unit"}
    figures = [f"{row['median']:,.4g} {row['unit']}"] if "median" in row else []
    figures += [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in common_fields
    ]
    return f"{row['what']:60} {', '.join(figures)}"


def peak_memory(run: Callable[[], object], device: str) -> float | None:
    """Return the MiB that a call adds at its highest to the memory in use before it.

    Args:
        run: the call.
        device: ``"cpu"`` for the resident memory of this process, else the GPU's memory.

    Returns:
        None for a CPU where the system does not tell (only Linux does); `run` is called anyway.
    """
    if device != "cpu":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - before) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the process's peak to its memory now
    except OSError:
        run()
        return None
    before = _status("VmRSS")
    run()
    return (_status("VmHWM") - before) / 2**10


def _status(name: str) -> int:
    """A field of Linux's status of this process, in KiB."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    """Return the hardware and the versions that rows are measured with."""
    names = ("torch", "transformers", "datasets", "torchdata", "numpy", "triton")
    return {
        "processor": cpu(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none: CUDA is not measured",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": _commit(),
    }


def _commit() -> str:
    """The commit of the code; empty where no git can tell it."""
    if shutil.which("git") is None:
        return ""
    command = ["git", "rev-parse", "--short", "HEAD"]
    return subprocess.run(command, capture_output=True, text=True, check=False).stdout.strip()


def write(name: str, rows: list[dict[str, Any]], command: str) -> Path:
    """Add a run's rows to benchmarks/results/NAME.json, a list of runs, and return its path.

    An older run of the same command on the same kind of processor is replaced.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    new = {"command": command, "machine": machine(), "rows": rows}
    runs = [run for run in runs if _origin(run) != _origin(new)]
    runs.append(new)
    path.write_text(json.dumps(runs, indent=1) + "\n")
    return path


def _origin(run: dict[str, Any]) -> tuple[str, str]:
    """The command and the processor of a run."""
    return run["command"], run["machine"]["processor"]


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"
