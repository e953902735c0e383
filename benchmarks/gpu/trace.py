"""Where a pack's time goes: a trace, and the share of each kind of kernel."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile

from benchmarks import rows
from benchmarks.first_pack import at_first_pack
from benchmarks.gpu.parts import Row, Setting
from benchmarks.gpu.scoring import CASES, Case, name_of
from benchmarks.gpu.shapes import SHAPES, make_model, make_samples
from benchmarks.scoring import peers

ENOUGH = 0.6  # of the matrix products' rate: a case that reaches it needs no trace
# What a kernel's name has in it, by kind; the first that fits.
KINDS = {
    "attention": ("flash", "fmha", "attention", "softmax"),
    "head": ("_tally",),
    "matrix products": ("gemm", "nvjet", "cutlass", "addmm", "mm"),
    "copies": ("memcpy", "memset", "copy", "cat"),
    "norms, activations and the like": ("elementwise", "reduce", "vectorized", "triton"),
}


def measure(setting: Setting) -> Iterator[Row]:
    """Yield shares of the time for the first case, and for every one that is too slow."""
    for number, case in enumerate(case for case in CASES if "flowdata" in case.loops):
        if setting.seconds_left() < 0:
            return
        share = share_of(case, setting.rows)
        if number == 0 or (share is not None and share < ENOUGH):
            yield from trace_case(case, setting)


def share_of(case: Case, rows_so_far: tuple[Row, ...]) -> float | None:
    """The share of the products' rate that flowdata reached in a case, None if not measured."""
    name = f"{name_of(case)}: flowdata"
    return next((row["share_of_matmul"] for row in rows_so_far if row["what"] == name), None)


def trace_case(case: Case, setting: Setting) -> Iterator[Row]:
    """Write a trace of scoring a few packs, and yield where their time went."""
    shape, vocabulary, count = SHAPES[case.shape], case.vocabulary, 400
    if setting.is_tiny:
        shape, vocabulary, count = shape.tiny(), 512, 12
    model = make_model(shape, vocabulary, setting.device).bfloat16()
    samples = make_samples(setting, count, vocabulary, case.share)
    peers.scored(model, samples, dtype="bfloat16")
    starts: list[float] = []
    with at_first_pack(lambda: starts.append(perf_counter())):  # after plan and check
        peers.scored(model, samples, dtype="bfloat16")
    seconds = perf_counter() - starts[0]
    on_gpu = setting.device == "cuda"
    activity = ProfilerActivity.CUDA if on_gpu else ProfilerActivity.CPU
    profiler = profile(activities=[ProfilerActivity.CPU, activity] if on_gpu else [activity])
    with at_first_pack(profiler.start):
        peers.scored(model, samples, dtype="bfloat16")
    profiler.stop()
    profiler.export_chrome_trace(str(setting.output / f"trace-{case.shape}.json.gz"))
    kernels = times_of(profiler, on_gpu=on_gpu)
    total = sum(kernels.values())
    name = name_of(case)
    yield rows.row(f"{name}: busy", [total / 1e6 / seconds], "share of the time")
    kinds: Counter[str] = Counter()
    for kernel, microseconds in kernels.items():
        kinds[kind_of(kernel)] += microseconds
    for kind, microseconds in kinds.most_common():
        yield rows.row(f"{name}: {kind}", [microseconds / total], "share of the busy time")
    for kernel, microseconds in kernels.most_common(12):
        yield rows.row(f"{name}: {kernel[:90]}", [microseconds / total], "share of the busy time")


def times_of(profiler: Any, *, on_gpu: bool) -> Counter[str]:
    """Microseconds of each kernel by name; on a CPU of each operation, less what it calls."""
    times: Counter[str] = Counter()
    for event in profiler.key_averages():
        if not on_gpu:
            times[event.key] = event.self_cpu_time_total
        elif event.device_type == torch.autograd.DeviceType.CUDA:
            times[event.key] = event.self_device_time_total
    return times


def kind_of(kernel: str) -> str:
    """The kind of work that a kernel does, by its name."""
    name = kernel.lower()
    fits = (kind for kind, words in KINDS.items() if any(word in name for word in words))
    return next(fits, "other")
