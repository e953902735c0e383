"""FlowSampler against the usual ways to draw samples by weight.

`python -m benchmarks sampler` runs each sampler in a process of its own. It measures the set-up,
the time to the first index, the indices a second with the set-up and without it, and the memory
beyond the float32 weights. Before anything is timed, the counts of each sampler's draws are
compared with num_samples · w / Σw. The peers are `WeightedRandomSampler`, numpy's
`Generator.choice`, and the `DistributedSamplerWrapper` that training frameworks put around a
sampler: a `DistributedSampler` (here of a single rank) takes a rank's share from the list of all
indices.
"""

from __future__ import annotations

import argparse
import math
import multiprocessing
import resource
from collections import deque
from collections.abc import Iterator
from time import perf_counter
from typing import Any

import numpy as np
import torch
from torch.utils.data import DistributedSampler, Sampler, WeightedRandomSampler

from benchmarks.rows import row, write
from flowdata.sampler import FlowSampler

SIZES = [10**6, 2**24, 10**8]


class Choice(Sampler[int]):
    """Numpy's weighted choice as a sampler."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.chances = weights.double().numpy()
        self.chances /= self.chances.sum()

    def __len__(self) -> int:
        return len(self.chances)

    def __iter__(self) -> Iterator[int]:
        count = len(self.chances)
        yield from np.random.default_rng(0).choice(count, count, p=self.chances).tolist()


class Wrapper(DistributedSampler):
    """The wrapper of training frameworks: a distributed sampler over another sampler's list."""

    def __init__(self, weights: torch.Tensor) -> None:
        self.inner = WeightedRandomSampler(weights, len(weights))
        super().__init__(range(len(weights)), 1, 0, shuffle=False)

    def __iter__(self) -> Iterator[int]:
        indices = list(self.inner)
        return (indices[position] for position in super().__iter__())


PEERS = {
    "FlowSampler systematic": lambda weights: FlowSampler(weights, num_replicas=1, rank=0),
    "FlowSampler multinomial": lambda weights: FlowSampler(
        weights, num_replicas=1, rank=0, method="multinomial"
    ),
    "FlowSampler without replacement, half": lambda weights: FlowSampler(
        weights, len(weights) // 2, num_replicas=1, rank=0, replacement=False
    ),
    "WeightedRandomSampler": lambda weights: WeightedRandomSampler(weights, len(weights)),
    "numpy Generator.choice": Choice,
    "DistributedSamplerWrapper": Wrapper,
}


def main(arguments: list[str]) -> None:
    """Print and store each sampler's figures at each size."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks sampler", description=__doc__)
    parser.add_argument("--sizes", type=int, nargs="*", default=SIZES)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--peers", nargs="*", choices=PEERS, default=list(PEERS))
    parser.add_argument("--dry-run", action="store_true", help="print, but keep no results")
    options = parser.parse_args(arguments)
    for peer in options.peers:
        check(peer)
    rows = []
    for size in options.sizes:
        for peer in options.peers:
            rows += show(measure(peer, size, options.repeats))
    rows += show(ratios(rows))
    if not options.dry_run:
        print(write("sampler", rows, " ".join(["python -m benchmarks sampler", *arguments])))


def show(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Print rows, and return them."""
    for each in rows:
        median = "fails" if each["median"] is None else f"{each['median']:.4g}"
        why = each.get("why", "")
        print(f"{each['what']:75} {median:>10} {each['unit']}  {why}", flush=True)
    return rows


def check(peer: str, size: int = 100_000) -> None:
    """Check that a sampler draws ∝ weight: each count within one, or all of them by chi-square."""
    weights = torch.rand(size, generator=torch.Generator().manual_seed(0))
    torch.manual_seed(0)
    counts = np.bincount(np.fromiter(PEERS[peer](weights), dtype=np.int64), minlength=size)
    expected = counts.sum() * weights.double().numpy() / weights.sum(dtype=torch.float64).item()
    if "without" in peer:
        assert counts.max() == 1
        mean_of_draws = weights.numpy()[counts > 0].mean()
        assert mean_of_draws > 1.1 * weights.mean().item(), "heavy samples must come more often"
    elif "systematic" in peer:
        assert np.abs(counts - expected).max() < 1 + 1e-6
    else:
        # Chi-square needs more than a few draws a cell, so a cell is the sum over 100 samples.
        draws, mean_draws = (cell.reshape(-1, 100).sum(axis=1) for cell in (counts, expected))
        statistic = ((draws - mean_draws) ** 2 / mean_draws).sum()
        freedom = len(draws) - 1
        assert abs(statistic - freedom) < 5 * math.sqrt(2 * freedom), peer


def measure(peer: str, size: int, repeats: int) -> list[dict[str, Any]]:
    """Return the rows of one sampler at one size, each run in a fresh process."""
    context = multiprocessing.get_context("spawn")
    runs = []
    for _ in range(repeats):
        with context.Pool(1) as pool:
            runs.append(pool.apply(one_run, (peer, size)))
        if "failure" in runs[-1]:
            why = runs[-1]["failure"]
            return [
                {"what": f"{peer}, {size}: {name}", "median": None, "unit": unit, "why": why}
                for name, unit in UNITS.items()
                if name != RESUMPTION
            ]
    return [
        row(f"{peer}, {size}: {name}", [run[name] for run in runs], unit)
        for name, unit in UNITS.items()
        if name in runs[0]
    ]


RESUMPTION = "first index, resumed at the end"
UNITS = {
    "set-up": "s",
    "first index": "s",
    "indices, set-up included": "1/s",
    "indices, once begun": "1/s",
    "memory over the weights": "MiB",
    RESUMPTION: "s",
}


def one_run(peer: str, size: int) -> dict[str, Any]:
    """Return the figures of setting a sampler up, taking its first index and all others."""
    torch.set_num_threads(1)
    weights = torch.rand(size, generator=torch.Generator().manual_seed(0))
    memory = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    start = perf_counter()
    try:
        sampler = PEERS[peer](weights)
        set_up_end = perf_counter()
        iterator = iter(sampler)
        next(iterator)
    except RuntimeError as error:
        return {"failure": str(error).splitlines()[0]}
    first = perf_counter()
    deque(iterator, maxlen=0)
    end = perf_counter()
    count = len(sampler)
    figures = {} if not isinstance(sampler, FlowSampler) else {RESUMPTION: resumption(sampler)}
    return figures | {
        "set-up": set_up_end - start,
        "first index": first - set_up_end,
        "indices, set-up included": count / (end - start),
        "indices, once begun": (count - 1) / (end - first),
        "memory over the weights": (resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - memory)
        / 1024,
    }


def resumption(sampler: FlowSampler) -> float:
    """Return the seconds that it takes to load a state of the last position and draw there."""
    state = {**sampler.state_dict(), "position": len(sampler) - 1}
    start = perf_counter()
    sampler.load_state_dict(state)
    next(iter(sampler))
    return perf_counter() - start


def ratios(rows: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Return rows of how many times faster the systematic sampler is than each peer."""
    name = "indices, set-up included"
    speeds = {r["what"]: r["median"] for r in rows if r["what"].endswith(name)}
    systematic = "FlowSampler systematic"
    ours = {
        what.split(", ")[1]: speed for what, speed in speeds.items() if what.startswith(systematic)
    }
    return [
        {
            "what": f"{systematic} / {what}",
            "median": ours[what.split(", ")[1]] / speed,
            "unit": "times",
        }
        for what, speed in speeds.items()
        if "FlowSampler" not in what and speed is not None and what.split(", ")[1] in ours
    ]
