"""Threads: with how many PyTorch computes a run on a CPU.

PyTorch takes one for each core. Each operation waits for the last of its threads, so one that
another process keeps from its core makes all of them wait: on two busy cores two threads were
several times slower than one. How many are fastest is measured: a matrix product and a few sums
over rows, by one thread, by half of those allowed and by all.
"""

from __future__ import annotations

import functools
import os
import time
from collections.abc import Callable

import torch

from flowdata._common.cpus import usable_cpus

_WIDTH = 1024  # of the product
_SUMS = 6  # for each product: a layer has about as many passes over its activations
_ROUNDS, _SECONDS = 4, 0.008  # in turn, so that all numbers meet the same moments
_HOPELESS = 3.0  # times the best number's time: such a number is not measured again
# Of the numbers that take at most this many times the best one's time the fewest threads are taken:
# where other processes want the cores, each further thread is one more to wait for.
_NEARLY = 1.1


def choose_threads(dtype: torch.dtype, device: torch.device) -> int:
    """Return the fewest threads with which PyTorch computes about as fast as it can.

    They are at most those that it has now. A number that the user has set, by ``OMP_NUM_THREADS``,
    is kept. Numbers are measured once for the process, in 0.1 to 0.2 seconds.

    Args:
        dtype: in which the run computes.
        device: on which it computes; on another than a CPU the number is kept.
    """
    threads = torch.get_num_threads()
    if device.type != "cpu" or "OMP_NUM_THREADS" in os.environ:
        return threads
    return _fastest(min(threads, usable_cpus()), dtype)


def describe_threads(
    threads: int, device: torch.device, *, goes_on: bool, is_first: bool = True
) -> str:
    """Return a clause on the number of threads of a run on a CPU, "" on another device.

    Args:
        threads: the run's.
        device: on which it computes.
        goes_on: whether a part of the run's losses is there already.
        is_first: whether this is rank 0, which chooses for all.
    """
    own = torch.get_num_threads()
    if device.type != "cpu":
        return ""
    if threads == own:
        return f"threads: {threads}"
    if goes_on or (is_first and threads > own):  # more than its own are chosen in no run
        reason = (
            "as when the store was begun, since the last bits of its losses depend on the number; "
            f"to compute with {own}, score into another store"
        )
    elif not is_first:
        reason = "as rank 0 chose"
    elif threads == usable_cpus():
        reason = "one for each CPU that this process may use"
    else:
        reason = "chosen for speed"
    return f"threads: {threads} instead of {own}, {reason}"


@functools.cache
def _fastest(most: int, dtype: torch.dtype) -> int:
    numbers = sorted({1, max(1, most // 2), most})
    if len(numbers) == 1:
        return most
    before = torch.get_num_threads()
    try:
        times = _times(numbers, _layer_like(dtype))
    finally:
        torch.set_num_threads(before)
    return min(number for number in times if times[number] <= _NEARLY * min(times.values()))


def _times(numbers: list[int], work: Callable[[], None]) -> dict[int, float]:
    """The seconds that some work takes by the number of threads, without the hopeless ones."""
    times = dict.fromkeys(numbers, 0.0)
    for turn in range(_ROUNDS):
        for number in times:
            torch.set_num_threads(number)
            if turn == 0:
                work()  # starts the threads
            times[number] += _seconds(work)
        least = min(times.values())
        times = {number: each for number, each in times.items() if each <= _HOPELESS * least}
    return times


def _seconds(work: Callable[[], None]) -> float:
    """The mean seconds of some work, done for at least `_SECONDS`."""
    start, count = time.perf_counter(), 0
    while (elapsed := time.perf_counter() - start) < _SECONDS or not count:
        work()
        count += 1
    return elapsed / count


def _layer_like(dtype: torch.dtype) -> Callable[[], None]:
    """Work in the proportions of a layer: a product, and passes over its rows."""
    rows, columns = torch.ones(_WIDTH, _WIDTH, dtype=dtype), torch.ones(_WIDTH, _WIDTH, dtype=dtype)

    def work() -> None:
        activations = rows @ columns
        for _ in range(_SUMS):
            activations.float().square().mean(-1)

    return work
