"""`flowdata demo`: its options; `flowdata.cli.demo_run` runs it."""

from __future__ import annotations

import argparse

from flowdata.cli.demo_run import run_demo
from flowdata.cli.exit_codes import DONE
from flowdata.cli.output import print_result


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the command's options to its parser."""
    add = parser.add_argument
    add("--output", default="flowdata-demo.png", help="the picture (default: %(default)s)")
    add("--seeds", type=int, default=4, help="repetitions (default: %(default)s)")


def run(options: argparse.Namespace) -> int:
    """When weights help, and what drift chooses, on a small real task."""
    result = run_demo(options.output, seeds=options.seeds, progress=not options.quiet)
    print_result(options, result.to_dict(), str(result))
    return DONE
