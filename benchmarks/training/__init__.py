"""What weights cost in training: python -m benchmarks training [--tiny] [--routes …] …

Each measurement runs in a process of its own, because a peak of memory belongs to a process. The
weighted and unweighted runs of a route take turns in one process. At each vocabulary the fused
loss is compared with the same loss of full logits, by hand (PyTorch's cross-entropy, weighted) and
by `causal_lm_loss`. Only head and loss run then, forward and backward, with the head's gradients.
Values and gradients are compared before anything is timed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from typing import Any

from benchmarks import rows
from benchmarks.training import head_loss, routes


def main(argv: list[str]) -> None:
    """Measure every route and every vocabulary, print ratios, and write the rows."""
    parser = argparse.ArgumentParser(prog="python -m benchmarks training")
    parser.add_argument("--routes", nargs="*", default=routes.ROUTES, choices=routes.ROUTES)
    parser.add_argument("--vocabulary", nargs="*", type=int, default=[32768, 65536, 131072, 262144])
    parser.add_argument("--tokens", type=int, default=2048)
    parser.add_argument("--width", type=int, default=576, help="of the head")
    parser.add_argument("--model-width", type=int, default=256, help="of the routes' model")
    parser.add_argument("--model-layers", type=int, default=4)
    parser.add_argument("--model-dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
    parser.add_argument("--steps", type=int, default=20, help="timed steps of each kind")
    parser.add_argument("--repeats", type=int, default=5, help="runs of each kind")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for correctness")
    parser.add_argument("--device", default="cpu")
    parser.add_argument("--one", help=argparse.SUPPRESS)
    options = parser.parse_args(argv)
    if options.tiny:
        options.vocabulary, options.tokens, options.width, options.steps = [512], 64, 32, 2
    if options.device == "cpu" and sys.platform != "linux":
        parser.error("peak memory of a CPU is read from Linux's /proc: pass --device cuda")
    if options.one:
        print(json.dumps(_measure(options.one, options)))
        return
    results = []
    for route in options.routes:
        pair = _in_a_process(f"route:{route}", argv)
        print(f"{route:10} weighted / unweighted step {_ratio(pair, 'weighted', 'plain'):.3f}")
        results += pair
    for size in options.vocabulary:
        head_loss.check_equal(options.width, min(size, 4096))
        parts = [_in_a_process(f"loss:{loss}:{size}", argv) for loss in head_loss.LOSSES]
        losses = [row for part in parts for row in part]
        for kind in ("time", "memory"):
            for other in head_loss.LOSSES[:-1]:
                ratio = _ratio(losses, f"fused {kind}", f"{other} {kind}")
                print(f"{size:7} fused / {other} {kind} {ratio:.3f}", flush=True)
        results += losses
    if not options.tiny:
        print(rows.write("training", results, "python -m benchmarks training " + " ".join(argv)))


def _in_a_process(measurement: str, argv: list[str]) -> list[dict[str, Any]]:
    """Make one measurement in a process of its own, and return its rows."""
    command = [sys.executable, "-m", "benchmarks", "training", *argv, "--one", measurement]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    if run.returncode:
        sys.exit(run.stderr[-3000:])
    # A framework may print what it likes before; the rows are the last line.
    results: list[dict[str, Any]] = json.loads(run.stdout.splitlines()[-1])
    return results


def _measure(measurement: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Make the measurement that `route:NAME` or `loss:NAME:VOCABULARY` names."""
    kind, name, *size = measurement.split(":")
    if kind == "route":
        return routes.measure(name, options)
    return head_loss.measure(name, int(size[0]), options)


def _ratio(results: list[dict[str, Any]], over: str, under: str) -> float:
    medians = {row["what"].partition(": ")[2]: row["median"] for row in results}
    return float(medians[over] / medians[under])
