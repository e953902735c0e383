"""Scoring on a machine that others use too: python -m benchmarks busy [--others 0 1 2] …

Other processes multiply matrices without end while `flowdata bench` runs in a process of its own:
the usual loop, with PyTorch's own number of threads, and scoring take turns, after their losses
have been compared. Each repeat is a new process, since the number of threads is chosen once in one.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager

from benchmarks.rows import line, row, write

_OTHER = """
import torch
torch.set_num_threads(1)
matrix = torch.ones(768, 768)
while True:
    matrix @ matrix
"""


@contextmanager
def others(count: int) -> Iterator[None]:
    """Let a number of processes compute, each with one thread, for a block."""
    processes = [subprocess.Popen([sys.executable, "-c", _OTHER]) for _ in range(count)]
    try:
        yield
    finally:
        for process in processes:
            process.kill()
            process.wait()


def bench(samples: int) -> dict[str, float]:
    """Return the figures of `flowdata bench`, with the threads that PyTorch chooses."""
    environment = {name: value for name, value in os.environ.items() if name != "OMP_NUM_THREADS"}
    command = [sys.executable, "-m", "flowdata", "bench", "--json", "--samples", str(samples)]
    output = subprocess.run(command, env=environment, check=True, stdout=subprocess.PIPE).stdout
    figures: dict[str, float] = json.loads(output)
    if figures["largest_difference"] > 0.1:  # nats; bfloat16's rounding is a few hundredths
        sys.exit(f"the two loops differ by {figures['largest_difference']} nats")
    return figures


def main(argv: Sequence[str] | None = None) -> None:
    """Measure with each number of other processes; write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks busy", description=__doc__)
    parser.add_argument("--others", nargs="+", type=int, default=[0, 1, 2], help="processes")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--samples", type=int, default=32)
    options = parser.parse_args(argv)
    rows = []
    for count in options.others:
        with others(count):
            figures = [bench(options.samples) for _ in range(options.repeats)]
        for what, unit in {"usual_loop": "tokens/s", "flowdata": "tokens/s", "ratio": "×"}.items():
            values = [each[what] for each in figures]
            rows.append(row(f"{what}, beside {count} others", values, unit, worst=min(values)))
            print(line(rows[-1]), flush=True)
    words = [f"--{name} {value}" for name, value in vars(options).items() if name != "others"]
    numbers = " ".join(map(str, options.others))
    write("busy", rows, f"python -m benchmarks busy --others {numbers} {' '.join(words)}")


if __name__ == "__main__":
    main()
