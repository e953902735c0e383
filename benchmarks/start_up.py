"""What scoring does before its first pack: python -m benchmarks start_up [--samples 64 1024]

The library says how it scores just before the first pack; what counts here is the time until then:
reading lengths and prompts, planning, the fingerprint, and the check of a few samples alone. A
profile of a third run tells the check's share. Each repeat is a new process, whose first run also
measures the number of threads. The model and data are those of `python -m benchmarks scoring
--cases gsm8k`; jobs of this size are not compiled.
"""

from __future__ import annotations

import argparse
import cProfile
import pstats
import statistics
from collections.abc import Sequence
from multiprocessing import get_context
from time import perf_counter
from typing import Any

from benchmarks import rows
from benchmarks.first_pack import at_first_pack
from benchmarks.scoring.cases import CASES, make
from benchmarks.scoring.peers import scored
from flowdata.cli.bench_inputs import Samples


class Begun(BaseException):
    """Ends a run where its first pack would begin."""


def main(argv: Sequence[str]) -> None:
    """Measure each number of samples, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks start_up", description=__doc__)
    parser.add_argument("--samples", type=int, nargs="+", default=[64, 1024])
    parser.add_argument("--repeats", type=int, default=5)
    options = parser.parse_args(argv)
    results = []
    for count in options.samples:
        with get_context("spawn").Pool(1, maxtasksperchild=1) as processes:
            repeats = processes.map(measure, [count] * options.repeats, chunksize=1)
        first, again, shares = zip(*repeats, strict=True)
        row = rows.row(f"{count} samples: before the first pack", list(first), "s")
        row |= {"again": statistics.median(again), "share_of_check": statistics.median(shares)}
        print(rows.line(row), flush=True)
        results.append(row)
    print(rows.write("start_up", results, " ".join(["python -m benchmarks start_up", *argv])))


def measure(count: int) -> tuple[float, float, float]:
    """Return the seconds of a process's first and second run, and the check's share of a third."""
    model, samples = make(CASES["gsm8k"], count, "")
    model = model.bfloat16()
    return start_up(model, samples), start_up(model, samples), share_of_check(model, samples)


def start_up(model: Any, samples: Samples) -> float:
    """Return the seconds that a run takes before its first pack."""
    start = perf_counter()
    try:
        with at_first_pack(end):
            scored(model, samples, dtype="bfloat16")
    except Begun:
        return perf_counter() - start
    raise SystemExit("the library didn't say how it scores")


def end() -> None:
    """End a run."""
    raise Begun


def share_of_check(model: Any, samples: Samples) -> float:
    """Return the share of that time in which a few samples are checked alone."""
    profile = cProfile.Profile()
    profile.runcall(start_up, model, samples)
    times: Any = pstats.Stats(profile)
    check = next(entry for (_, _, name), entry in times.stats.items() if name == "agreed_way")
    cumulative = check[3]
    return float(cumulative / times.total_tt)
