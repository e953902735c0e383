"""The studies of vision that ask when weights help: python -m benchmarks forgetting evidence.

What is run, and what was predicted, stands in registered_evidence.md, which was written first. All
of it goes on where it was stopped. Several processes share the sets and seeds.
"""

from __future__ import annotations

import argparse
import functools
import multiprocessing
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict
from itertools import chain
from pathlib import Path

import torch

from benchmarks.forgetting import vision
from benchmarks.forgetting.images import ASSETS
from benchmarks.forgetting.readouts import readouts
from benchmarks.rows import RESULTS
from flowdata.study import LINEAR_PROBE, STANDARD, HeadTask, Record, grids, run_study

EVIDENCE = RESULTS / "evidence"
SEEDS = range(5)
# Where rows are wrong, what is learned most is learned at a larger rate, and the rivals' fronts are
# flat at the smallest one.
RATES, RATES_FOR_WRONG = (0.001, 0.003, 0.01, 0.03), (0.001, 0.003, 0.01, 0.03, 0.1)
RATES_OF_RIVALS_FOR_WRONG = (0.003, 0.01, 0.03)
CLEAN = vision.TARGETS
SHARES = {  # of the training rows that are wrong
    **{f"wrong{percent}_fashion_mnist": percent / 100 for percent in (10, 20, 33, 50)},
    "pairs20_fashion_mnist": 0.2,
    "misjudged20_fashion_mnist": 0.2,
}
TARGETS = (*CLEAN, *SHARES, "rare_fashion_mnist")
WITH_ALL_RIVALS = ("fashion_mnist", "wrong33_fashion_mnist", "digits")
WITH_SUM = ("letters", "textures", "wrong20_fashion_mnist")  # on which FLOW + ℓ2 is checked
FLOW, MEAN_WEIGHT, ANCHOR = "FLOW", "standard, smaller steps", "output anchor"
FLOW_AND_ANCHOR = "FLOW + output anchor"
STRENGTHS = {  # names of each rival, at three strengths
    "ℓ2": ("l2", "l2, 0.03", "l2, 0.1"),
    "WiSE-FT": ("WiSE-FT, 0.25", "WiSE-FT", "WiSE-FT, 0.75"),
    "LoRA": ("LoRA, rank 2", "LoRA", "LoRA, rank 32"),
}
CORE = (LINEAR_PROBE, STANDARD, FLOW, MEAN_WEIGHT, ANCHOR)
_RIVALS = (
    "FLOW normalised",
    *chain.from_iterable(STRENGTHS.values()),
    *("FLOW + l2", FLOW_AND_ANCHOR),
    *("standard, BatchNorm fixed", "FLOW, BatchNorm fixed"),
)
_CLEAN_TRIM = 0.1  # what somebody would leave out who does not know that all rows are right


def methods(target: str) -> dict[str, tuple[float, ...]]:
    """Return the methods of a target and the rates of each.

    Trimming and small-loss selection are run at the true share of wrong rows, and where rows are
    wrong or all rivals are run trimming also at half and twice of it.
    """
    share = SHARES.get(target, _CLEAN_TRIM)
    is_varied = target in SHARES or target in WITH_ALL_RIVALS
    shares = (share / 2, share, 2 * share) if is_varied else (share,)
    names = [*(f"trimmed, {each:.0%}" for each in shares if each < 1), f"small losses, {share:.0%}"]
    names += _RIVALS if target in WITH_ALL_RIVALS else ()
    names += ("l2", "FLOW + l2") if target in WITH_SUM else ()
    of_core, of_rivals = RATES, RATES
    if target in SHARES:
        of_core, of_rivals = RATES_FOR_WRONG, RATES_OF_RIVALS_FOR_WRONG
    return grids(CORE, of_core, vision.ALL) | grids(names, of_rivals, vision.ALL)


def runs(
    targets: Sequence[str], seeds: Sequence[int]
) -> Iterator[tuple[str, Mapping[str, tuple[float, ...]], int]]:
    """Yield target, methods and seed, all targets of a seed before the next one."""
    for seed in seeds:
        for target in targets:
            yield target, methods(target), seed


def add_options(parser: argparse.ArgumentParser) -> None:
    """Add the options of the evidence."""
    parser.add_argument("--assets", type=Path, default=ASSETS, help="holds vision/")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=TARGETS, metavar="TARGET")
    parser.add_argument("--seeds", nargs="+", type=int, default=list(SEEDS))
    parser.add_argument("--results", type=Path, default=EVIDENCE)
    parser.add_argument("--processes", type=int, default=1, help="that share sets and seeds")


def study(options: argparse.Namespace) -> None:
    """Run what the results files lack."""
    if options.processes == 1:
        _run_share(options, 0)
        return
    with multiprocessing.get_context("spawn").Pool(options.processes) as pool:
        pool.starmap(_run_share, [(options, place) for place in range(options.processes)])


def _run_share(options: argparse.Namespace, place: int) -> None:
    """Run one process's sets and seeds, with its share of the threads."""
    torch.set_num_threads(max(1, torch.get_num_threads() // options.processes))

    @functools.cache  # made once it is needed, since a network is inverted for it
    def task(target: str) -> HeadTask:
        return vision.task(options.assets, target, vision.SIZES, readouts)

    def run(target: str, method: str, rate: float, seed: int) -> Record:
        return task(target).run(method, rate, seed)

    of_process = slice(place, None, options.processes)
    for target, of_target, seed in [*runs(options.targets, options.seeds)][of_process]:
        run_study(
            options.results / f"forgetting_{target}.jsonl",
            {"study": "vision", "target": target, **asdict(vision.SIZES)},
            functools.partial(run, target),
            methods=of_target,
            seeds=[seed],
        )
