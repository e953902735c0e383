"""`flowdata bench`: its options; `flowdata.cli.bench_run` measures."""

from __future__ import annotations

import argparse
from dataclasses import asdict

from flowdata.cli.bench_run import run_bench
from flowdata.cli.exit_codes import DONE
from flowdata.cli.options import FAST_DTYPE, add_dtype
from flowdata.cli.output import print_result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add_dtype(parser, FAST_DTYPE)
    parser.add_argument("--device", help="default: a GPU if there is one")
    parser.add_argument(
        "--samples", type=int, default=64, help="random samples (default: %(default)s)"
    )


def run(options: argparse.Namespace) -> int:
    """Measure scoring on this machine against the usual loop."""
    result = run_bench(dtype=options.dtype, device=options.device, samples=options.samples)
    print_result(options, asdict(result), str(result))
    return DONE
