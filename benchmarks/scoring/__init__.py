"""Scoring speed against the loops people write: python -m benchmarks scoring [--cases NAME ...].

In every case all loops get the same model and samples. Each one's losses are first compared with
one sample at a time in float32; then the loops are timed in turn. Tokens are real ones, without
padding. The share of the matrix products' rate counts only the operations that scoring can't do
without (flowdata/bench.py says which), so no loop gains from work it wastes.
"""

from __future__ import annotations

import argparse
from typing import Any

from benchmarks import rows
from benchmarks.scoring import images, language


def main(argv: list[str]) -> None:
    """Measure the cases asked for, print rows as they come, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*language.CASES, *images.CASES]
    parser.add_argument("--cases", nargs="+", choices=names, default=names, metavar="CASE")
    parser.add_argument("--loops", nargs="+", choices=list(language.LOOPS), metavar="LOOP")
    parser.add_argument("--samples", type=int, default=96, help="of the largest cases")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smollm2", default="models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    options = parser.parse_args(argv)
    measured: list[dict[str, Any]] = []
    for name in options.cases:
        if name in images.CASES:
            found, show = images.measure(name, options.repeats), images.show
        else:
            found = language.measure(
                name, options.samples, options.repeats, options.loops or [], options.smollm2
            )
            show = language.show
        for row in found:
            show(row)
            measured.append(row)
        path = rows.write("scoring", measured, " ".join(["python -m benchmarks scoring", *argv]))
    print(path)
