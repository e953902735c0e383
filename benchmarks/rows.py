"""What every benchmark prints and keeps: rows with their unit, spread, machine and versions."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import statistics
import subprocess
from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

RESULTS = Path(__file__).parent / "results"


def timed(run: Callable[[], object], repeats: int = 5, warmup: int = 1) -> list[float]:
    """Seconds of `repeats` calls after `warmup` untimed ones."""
    for _ in range(warmup):
        run()
    seconds = []
    for _ in range(repeats):
        start = perf_counter()
        run()
        seconds.append(perf_counter() - start)
    return seconds


def row(what: str, values: list[float], unit: str, **more: Any) -> dict[str, Any]:
    """One measured quantity: median and spread (smallest and largest) of its runs."""
    spread = [min(values), max(values)]
    median = statistics.median(values)
    return {"what": what, "median": median, "spread": spread, "unit": unit, **more}


def line(row: dict[str, Any]) -> str:
    """A row as it is printed: its figures by their names, the median first."""
    spread = {"what", "part", "median", "spread", "unit"}
    figures = [f"{row['median']:,.4g} {row['unit']}"] if "median" in row else []
    figures += [
        f"{name} {value:.3g}" if isinstance(value, float) else f"{name} {value}"
        for name, value in row.items()
        if name not in spread
    ]
    return f"{row['what']:60} {', '.join(figures)}"


def peak_memory(run: Callable[[], object]) -> float | None:
    """MiB that a call adds to the process's resident memory at its highest; None off Linux.

    Where there is a GPU, what it adds to that one's memory.
    """
    if torch.cuda.is_available():
        torch.cuda.reset_peak_memory_stats()
        held = torch.cuda.memory_allocated()
        run()
        return (torch.cuda.max_memory_allocated() - held) / 2**20
    try:
        Path("/proc/self/clear_refs").write_text("5")  # sets the high-water mark to now
        before = _status("VmRSS")
        run()
        return (_status("VmHWM") - before) / 1024
    except OSError:
        return None


def _status(name: str) -> int:
    lines = Path("/proc/self/status").read_text().splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


def machine() -> dict[str, Any]:
    """Where and with what the rows were measured."""
    names = ("torch", "transformers", "datasets", "torchdata", "numpy", "triton")
    commit = subprocess.run(
        ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=False
    ).stdout.strip()
    return {
        "processor": _processor(),
        "cores": torch.get_num_threads(),
        "gpu": torch.cuda.get_device_name()
        if torch.cuda.is_available()
        else "none: CUDA is not measured",
        "python": platform.python_version(),
        "versions": {name: _version(name) for name in names},
        "commit": commit,
    }


def write(name: str, rows: list[dict[str, Any]], command: str) -> Path:
    """Put a run's rows into benchmarks/results/NAME.json, a list of runs, and return its path.

    They take the place of what the same command gave before.
    """
    path = RESULTS / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    runs = json.loads(path.read_text()) if path.exists() else []
    runs = [run for run in runs if run["command"] != command]
    runs.append({"command": command, "machine": machine(), "rows": rows})
    path.write_text(json.dumps(runs, indent=1) + "\n")
    return path


def _version(name: str) -> str:
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    named = {key.strip(): value.strip() for key, value in fields.items()}
    extras = [flag for flag in ("amx_bf16", "avx512_bf16") if flag in named.get("flags", "")]
    return " ".join([named.get("model name", platform.processor()), *extras])
