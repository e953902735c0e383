"""Language models: tokens a second, padding not counted, of every loop on the same samples."""

from __future__ import annotations

import copy
import statistics
from collections.abc import Callable, Iterator, Mapping
from functools import partial
from importlib.util import find_spec
from pathlib import Path
from time import perf_counter
from typing import Any

import torch
from torch import Tensor
from torch.profiler import profile

from benchmarks import rows
from benchmarks.scoring import peers
from benchmarks.scoring.cases import CASES, make
from flowdata.cli.bench_inputs import Samples
from flowdata.cli.bench_yardsticks import (
    flops,
    matmul_rate,
    seconds_of,
    square_product,
    usual_loop,
)

LARGEST_ERRORS = {"float32": 1e-4, "bfloat16": 0.1}

Loop = Callable[[Any, Samples], Tensor]
_PRODUCTS = "products alone"

LOOPS: dict[str, Loop] = {
    "usual loop, float32": usual_loop,
    "flowdata, float32": lambda m, s: peers.scored(m, s, dtype="float32"),
    "usual loop": usual_loop,
    "one sample at a time": peers.one_at_a_time,
    "lm-eval": peers.lm_eval,
    "TRL": peers.trl,
    "vLLM": peers.vllm,
    "sorted, logits of targets only": peers.sorted_targets,
    "sorted, flash-attn": peers.sorted_flash,
    "flowdata": lambda m, s: peers.scored(m, s, dtype="bfloat16"),
    "flowdata, prompts apart": peers.prompts_apart,
    "flowdata, compiled": lambda m, s: peers.scored(m, s, dtype="bfloat16", compile=True),
}
PACKAGES = {
    "lm-eval": "lm_eval",
    "TRL": "trl",
    "vLLM": "vllm",
    "sorted, flash-attn": "flash_attn",
    "8-bit weights": "torchao",
}


def measure(
    name: str, samples: int, smollm2: str, device: torch.device, repeats: int, only: list[str]
) -> Iterator[dict[str, Any]]:
    """Yield a row for each loop of a case: first their losses are compared, then all are timed."""
    case = CASES[name]
    if case.width is None and not Path(smollm2).exists():
        print(f"smollm2 is left out: there is no {smollm2}; pass --smollm2 FILE")
        return
    if case.kind == "8-bit" and not is_installed("8-bit weights"):
        return
    model, data = make(case, case.count(samples), smollm2)
    model = model.to(device)
    low_model, few_samples = copy.deepcopy(model).bfloat16(), data[: case.compared]
    exact = peers.one_at_a_time(model, few_samples)
    loops = [loop for loop in case.loops if (not only or loop in only) and is_installed(loop)]
    pairs = {
        loop: (model, few_samples) if dtype_of(loop) == "float32" else (low_model, data)
        for loop in loops
    }
    yield from compare(name, pairs, exact, repeats, device)


def compare(
    name: str,
    pairs: dict[str, tuple[Any, Samples]],
    exact: Tensor,
    repeats: int,
    device: torch.device,
) -> Iterator[dict[str, Any]]:
    """Yield a row for each loop: first their losses are compared, then all are timed in turn.

    Args:
        name: the case's name.
        pairs: a model and samples for each loop, by its name among `LOOPS`.
        exact: the losses of the first samples, which all loops' are compared with.
        repeats: timed runs of each loop.
        device: where the models are.
    """
    runs: dict[str, Callable[[], Tensor]] = {}
    accuracy: dict[str, dict[str, Any]] = {}
    for loop, pair in pairs.items():
        run = partial(LOOPS[loop], *pair)
        try:
            accuracy[loop] = check(loop, run, exact, device)
            runs[loop] = run
        except (ImportError, torch.OutOfMemoryError) as error:
            reason = f"{type(error).__name__}: {error}".splitlines()[0]
            yield {"what": f"{name}: {loop}", "left_out": reason}
    work = {loop: flops(*pairs[loop]) for loop in runs}
    seconds, best, steady = time_in_turn(runs, max(work.values(), default=0.0), repeats, device)
    loop_rows = []
    for loop in runs:
        tokens = sum(len(sample["input_ids"]) for sample in pairs[loop][1])
        speeds = [tokens / s for s in seconds[loop]]
        row = rows.row(f"{name}: {loop}", speeds, "tokens/s", dtype=dtype_of(loop))
        row |= accuracy[loop]
        row["share_of_matmul"] = work[loop] / tokens * row["median"] / best
        row["share_of_steady_matmul"] = work[loop] / tokens * row["median"] / steady
        loop_rows.append(row)
    ours = max((row["median"] for row in loop_rows if "flowdata" in row["what"]), default=None)
    for row in loop_rows:
        row["matmul_tflops"] = best / 1e12
        row["steady_matmul_tflops"] = steady / 1e12
        row["best_flowdata_ratio"] = ours and ours / row["median"]
        yield row


def is_installed(loop: str) -> bool:
    """Return whether the package that a loop, or case, needs is installed; if not, say so."""
    if loop in PACKAGES and find_spec(PACKAGES[loop]) is None:
        print(f"{loop} is left out: {PACKAGES[loop]} is not installed")
        return False
    return True


def check(
    loop: str, run: Callable[[], Tensor], exact: Tensor, device: torch.device
) -> dict[str, Any]:
    """Return a loop's largest error, its memory and its first run's time; exit if it is wrong."""
    losses: list[Tensor] = []
    start = perf_counter()
    memory = rows.peak_memory(lambda: losses.append(run()), device.type)
    seconds = perf_counter() - start  # the first run's, compiling included
    error = (losses[0][: len(exact)] - exact).abs().max().item()
    if not error <= LARGEST_ERRORS[dtype_of(loop)]:
        raise SystemExit(f"{loop} gives other losses, by up to {error:.2g}")
    return {"largest_error": error, "memory_mib": memory, "first_run_s": seconds}


def time_in_turn(
    runs: Mapping[str, Callable[[], object]], work: float, repeats: int, device: torch.device
) -> tuple[dict[str, list[float]], float, float]:
    """Return the seconds of each run, and two rates of matrix products in FLOP/s.

    The first is the best of ten products, between rounds of the runs. The second is that of
    products as long as a run, in turn with the runs: neighbours on a host can halve the rate for
    seconds, and then this one says what the machine allowed in the time of the runs.

    Args:
        runs: what to time.
        work: FLOPs of the long products.
        repeats: rounds.
        device: of the products.
    """
    product, flops_of_it = square_product(torch.bfloat16, device)
    count = max(1, round(work / flops_of_it))
    all_runs = {**runs, _PRODUCTS: lambda: seconds_of(lambda: [product() for _ in range(count)])}
    seconds: dict[str, list[float]] = {loop: [] for loop in all_runs}
    rates = [matmul_rate(torch.bfloat16, device)]
    for _ in range(repeats):
        for loop, times in rows.timed_in_turn(all_runs, 1).items():
            seconds[loop] += times
        rates.append(matmul_rate(torch.bfloat16, device))
    steady = count * flops_of_it / statistics.median(seconds.pop(_PRODUCTS))
    return seconds, statistics.median(rates), steady


def profile_case(
    name: str, samples: int, smollm2: str, device: torch.device, most: int = 12
) -> Iterator[dict[str, Any]]:
    """Yield the operations that take most of the library's time on a case, in eager bfloat16."""
    model, data = make(CASES[name], CASES[name].count(samples), smollm2)
    model = model.to(device).bfloat16()
    LOOPS["flowdata"](model, data)
    with profile() as profiler:
        LOOPS["flowdata"](model, data)
    on_gpu = device.type == "cuda"
    times = {
        e.key: e.self_device_time_total if on_gpu else e.self_cpu_time_total
        for e in profiler.key_averages()
    }
    total = sum(times.values())
    for key in sorted(times, key=times.__getitem__, reverse=True)[:most]:
        yield rows.row(f"{name}: {key}", [times[key] / total], "share of the time")


def dtype_of(loop: str) -> str:
    """Return the dtype of a loop, which its name tells."""
    return "float32" if loop.endswith("float32") else "bfloat16"
