"""A GPU day in one command: python -m benchmarks gpu [--minutes 8] [--output DIR].

For whoever has a GPU for a quarter of an hour. In this order, each part with its own limit:

    checks      the tests that need a GPU
    scoring     billions of parameters, against the loops people write
    head        the head's losses, against Liger, cut-cross-entropy and the product alone
    fused_loss  the training loss and its gradients, against Liger's and full logits
    steps       a weighted training step against an unweighted one
    drift       a measurement of drift beside the steps of a training
    compiled    scoring with compiled layers, and what compiling costs
    trace       where the time of a pack goes

Rows are kept as they are made, so that whatever stops the command loses nothing: DIR/gpu.json, in
the form of the other results, beside summary.md, the tests' report and a trace for
https://ui.perfetto.dev. PyTorch, transformers and Triton suffice, and pytest for the tests; what is
not installed is named and left out. Where a limit cuts scoring's cases short, `--parts scoring
--minutes 30` gives them more. `--tiny` runs every part at a small size, on a CPU too, and measures
nothing.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
from pathlib import Path
from time import monotonic
from typing import Any

import torch

from benchmarks import rows
from benchmarks.gpu import checks, drift, fused_loss, goals, head, scoring, steps, trace
from benchmarks.gpu.parts import Measure, Setting, run_part
from benchmarks.scoring.cases import ASSETS

# Each part's share of the minutes. What a part leaves over is the next one's.
PARTS: dict[str, tuple[Measure, float]] = {
    "checks": (checks.measure, 0.25),
    "scoring": (scoring.measure, 0.33),
    "head": (head.measure, 0.07),
    "fused_loss": (fused_loss.measure, 0.05),
    "steps": (steps.measure, 0.08),
    "drift": (drift.measure, 0.05),
    "compiled": (scoring.measure_compiled, 0.1),
    "trace": (trace.measure, 0.07),
}


def main(argv: list[str]) -> None:
    """Run all parts, keep rows as they come, and say which goals were met."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks gpu")
    parser.add_argument("--minutes", type=float, help="for all parts together: 8, or 4 if tiny")
    parser.add_argument("--output", type=Path, help="a folder; without it a new temporary one")
    parser.add_argument("--parts", nargs="+", choices=PARTS, default=list(PARTS), metavar="PART")
    parser.add_argument("--tiny", action="store_true", help="small sizes: a try of the command")
    parser.add_argument("--assets", type=Path, default=ASSETS, help="where gsm8k_train.jsonl lies")
    parser.add_argument("--commit", help="of this code, where no git can tell it")
    options = parser.parse_args(argv)
    os.environ["PYTORCH_NVML_BASED_CUDA_CHECK"] = "1"  # no context yet: each part makes its own
    minutes = options.minutes or (4 if options.tiny else 8)
    device = "cuda" if torch.cuda.is_available() else "cpu"
    if device == "cpu" and not options.tiny:
        sys.exit("no GPU is here; --tiny tries the command on a CPU")
    output = options.output or Path(tempfile.mkdtemp(prefix="flowdata-gpu-"))
    output.mkdir(parents=True, exist_ok=True)
    rows_so_far = RowFile(
        output / "gpu.json", " ".join(["python -m benchmarks gpu", *argv]), options.commit
    )
    start = monotonic()
    share_behind, shares = 0.0, sum(PARTS[name][1] for name in options.parts)
    for name in options.parts:
        measure, share = PARTS[name]
        share_behind += share
        setting = Setting(
            device=device,
            is_tiny=options.tiny,
            output=output,
            assets=options.assets,
            deadline=start + 60 * minutes * share_behind / shares,
            rows=tuple(rows_so_far.rows),
        )
        print(f"== {name}, at most {setting.seconds_left():.0f} s", flush=True)
        for row in run_part(measure, setting):
            rows_so_far.add({"part": name, **row})
    summary = goals.summarize(rows_so_far.rows, is_tiny=options.tiny)
    (output / "summary.md").write_text(summary)
    print(f"\n{summary}\n{output}")
    if any("error" in row for row in rows_so_far.rows):
        sys.exit(1)


class RowFile:
    """The rows so far, in memory and in a file that is whole after every row."""

    def __init__(self, path: Path, command: str, commit: str | None) -> None:
        self.path, self.command, self.commit = path, command, commit
        self.rows: list[dict[str, Any]] = []
        self.machine: dict[str, Any] = {}

    def add(self, row: dict[str, Any]) -> None:
        """Keep a row; that of a part's machine is kept as the machine."""
        if "machine" in row:
            self.machine = row["machine"]
            self.machine["commit"] = self.commit or self.machine["commit"]
        else:
            self.rows.append(row)
            print(rows.line(row), flush=True)
        content = [{"command": self.command, "machine": self.machine, "rows": self.rows}]
        draft = self.path.with_suffix(".draft")
        draft.write_text(json.dumps(content, indent=1) + "\n")
        draft.replace(self.path)
