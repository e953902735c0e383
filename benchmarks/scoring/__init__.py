"""Scoring speed against the loops people write: python -m benchmarks scoring [--cases NAME ...].

In every case all loops get the same model and samples. Each loop's losses are first compared with
those of one sample at a time in float32; then the loops are timed in turn. Padding does not count
as tokens. The share of the matrix products' rate counts only the operations that scoring can't do
without (`flowdata.cli.bench_yardsticks.flops` says which), so that wasted work raises no share.
"""

from __future__ import annotations

import argparse
from typing import Any

import torch

from benchmarks import rows
from benchmarks.scoring import images, language
from benchmarks.scoring.cases import CASES


def main(argv: list[str]) -> None:
    """Measure the cases asked for, print rows as they come, and write them."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    names = [*CASES, *images.CASES]
    usual = [name for name in names if name != "billion"]
    parser.add_argument("--cases", nargs="+", choices=names, default=usual, metavar="CASE")
    parser.add_argument("--loops", nargs="+", choices=list(language.LOOPS), metavar="LOOP")
    parser.add_argument("--samples", type=int, default=96, help="of the largest cases")
    parser.add_argument("--repeats", type=int, default=2)
    parser.add_argument("--smollm2", default="models/smollm2/SmolLM2-135M-Instruct.Q4_1.gguf")
    here = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cpu", "cuda"), default=here)
    parser.add_argument("--profile", action="store_true", help="where a language case's time goes")
    options = parser.parse_args(argv)
    if options.profile and set(options.cases) & set(images.CASES):
        parser.error("--profile takes language cases: name them with --cases")
    device = torch.device(options.device)
    results: list[dict[str, Any]] = []
    for name in options.cases:
        sizes = name, options.samples, options.smollm2, device
        if name in images.CASES:
            case_rows = images.measure(name, options.repeats, device)
        elif options.profile:
            case_rows = language.profile_case(*sizes)
        else:
            case_rows = language.measure(*sizes, options.repeats, options.loops or [])
        for row in case_rows:
            print(rows.line(row), flush=True)
            results.append(row)
        path = rows.write("scoring", results, " ".join(["python -m benchmarks scoring", *argv]))
    print(path)
