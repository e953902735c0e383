"""A study: every method at every learning rate of its grid, on every seed.

Every finished run is one JSON line of a results file, so a study that was stopped goes on where
it was: a run whose line is there is not run again. Seeds are the outermost loop, so an unfinished
study is a whole study of fewer seeds, and processes that are given different seeds share the work.
A method's learning rate is chosen by the validation score on the *new* task alone, as somebody
without the old data has to choose it.
"""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, TypeAlias

import torch

from flowdata._common.notices import logger, say
from flowdata.study.methods import STANDARD

Record: TypeAlias = dict[str, Any]
Runs: TypeAlias = dict[str, list[Record]]  # each method's records, in the order of their seeds
Runner: TypeAlias = Callable[[str, float, int], Record]  # method, rate, seed → measures


def run_study(
    path: Path,
    options: dict[str, Any],
    run: Runner,
    *,
    methods: Mapping[str, Sequence[float]],
    seeds: Iterable[int],
) -> list[Record]:
    """Run what the results file lacks, and return the records of this study.

    Args:
        path: of the results file, JSON lines; new runs are appended to it.
        options: all that a run depends on beside method, rate and seed; runs under other
            options don't count. ``study`` and ``target`` among them make the page's title.
        run: returns ``validation`` (higher is better), ``target`` and ``retained`` (mappings of
            measures by name) and whatever else is worth a note. Where a measure's name ends in
            ``accuracy``, it is in % and more of it is better; less is better of all others.
        methods: names, each with the learning rates to run it at, see `grids`.
        seeds: of the runs.

    Returns:
        Records under these options, older ones included.
    """
    options = json.loads(json.dumps(options))  # as they come back from the file
    keys: list[Record] = [
        {"method": method, "rate": rate, "seed": seed, "options": options}
        for seed in seeds
        for method, rates in methods.items()
        for rate in rates
    ]
    finished = {key_of(record) for record in read_records(path)}
    for key in keys:
        if key_of(key) in finished:
            continue
        start = perf_counter()
        record = key | run(key["method"], key["rate"], key["seed"])
        record |= {"seconds": round(perf_counter() - start, 2), "torch": torch.__version__}
        append_record(path, record)
        say(line_of(record))
    return [record for record in read_records(path) if record["options"] == options]


def validation_of(record: Record) -> float:
    """Return a run's score; a run that diverged comes last."""
    value = float(record["validation"])
    return value if math.isfinite(value) else -math.inf


def swept_runs(records: Iterable[Record]) -> dict[str, dict[float, list[Record]]]:
    """Return each method's runs by rate, at the rates that it was run at on the most seeds."""
    by_method: dict[str, dict[float, list[Record]]] = {}
    for record in records:
        by_method.setdefault(record["method"], {}).setdefault(record["rate"], []).append(record)
    return {
        method: {
            rate: sorted(rates[rate], key=lambda record: record["seed"])
            for rate in sorted(rates)
            if len(rates[rate]) == max(map(len, rates.values()))
        }
        for method, rates in by_method.items()
    }


def chosen_rates(records: Iterable[Record]) -> dict[str, float]:
    """Return each method's rate of the highest mean validation score, the smaller of equals.

    Only rates that were run on as many seeds as any other of the method count.
    """
    return {
        method: max(rates, key=lambda rate: mean(map(validation_of, rates[rate])))
        for method, rates in swept_runs(records).items()
    }


def edges(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return the methods whose grid may have ended too early, by side: ``larger`` or ``smaller``.

    On such a side no rate was tried that turned out no better than the chosen one, on the seeds
    that both were run on: one seed is enough to see where a grid may end. Methods with a single
    rate don't count.
    """
    records = list(records)
    best_rates = chosen_rates(records)
    open_ended: dict[str, list[str]] = {"larger": [], "smaller": []}
    for method, rates in _validation_scores(records).items():
        best = best_rates[method]
        no_better = [rate for rate, scores in rates.items() if _is_no_better(scores, rates[best])]
        if len(rates) > 1:
            if max(no_better) == best:  # the chosen rate is among them
                open_ended["larger"].append(method)
            if min(no_better) == best:
                open_ended["smaller"].append(method)
    return open_ended


def _is_no_better(scores: Mapping[int, float], best: Mapping[int, float]) -> bool:
    shared = scores.keys() & best.keys()
    return bool(shared) and sum(scores[s] for s in shared) <= sum(best[s] for s in shared)


def _validation_scores(
    records: Iterable[Record],
) -> dict[str, dict[float, dict[int, float]]]:
    """Each method's validation scores, by rate and seed."""
    scores: dict[str, dict[float, dict[int, float]]] = {}
    for record in records:
        of_rate = scores.setdefault(record["method"], {}).setdefault(record["rate"], {})
        of_rate[record["seed"]] = validation_of(record)
    return scores


def chosen_runs(records: Iterable[Record]) -> Runs:
    """Return each method's runs at the rate chosen for it, in the order of their seeds."""
    records = list(records)
    swept = swept_runs(records)
    return {method: swept[method][rate] for method, rate in chosen_rates(records).items()}


def runs_by_rate(records: Iterable[Record]) -> dict[float, Runs]:
    """Return all methods' runs at each rate of standard fine-tuning.

    Only those rates count that standard fine-tuning was run at on the most seeds. Methods that
    don't train have no rate and appear at each.
    """
    records = list(records)
    methods = dict.fromkeys(record["method"] for record in records)
    untrained = {record["method"] for record in records if record["rate"] == 0}
    return {
        rate: _runs_at({m: 0.0 if m in untrained else rate for m in methods}, records)
        for rate in swept_runs(records).get(STANDARD, {})
    }


def runs_at_rate_of_standard(records: Iterable[Record]) -> Runs:
    """Return all methods' runs at the rate chosen for standard fine-tuning; empty without one."""
    records = list(records)
    rate = chosen_rates(records).get(STANDARD)
    return {} if rate is None else runs_by_rate(records)[rate]


def _runs_at(rates: Mapping[str, float], records: list[Record]) -> Runs:
    runs: Runs = {name: [] for name in rates}
    for record in sorted(records, key=lambda record: record["seed"]):
        if record["rate"] == rates[record["method"]]:
            runs[record["method"]].append(record)
    return {name: of_method for name, of_method in runs.items() if of_method}


def key_of(record: Record) -> str:
    """Return what tells a run from all others, as text: its options, method, rate and seed."""
    return json.dumps(
        [record[name] for name in ("options", "method", "rate", "seed")], sort_keys=True
    )


def read_records(path: Path) -> list[Record]:
    """Return the runs of a results file; a last line that was torn off is left out."""
    if not path.exists():
        return []
    records = []
    for text in filter(None, path.read_text().splitlines()):
        try:
            records.append(json.loads(text))
        except ValueError:
            logger.warning("%s: a torn line is left out: %r", path, text[:60])
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a run as one line, in one write: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
    # A process that was killed may have left half a line: it is ended here, or it would take the
    # new one with it.
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    text = "\n" * is_torn + json.dumps(record) + "\n"
    file = os.open(path, os.O_WRONLY | os.O_APPEND | os.O_CREAT, 0o644)
    try:
        os.write(file, text.encode())
        os.fsync(file)
    finally:
        os.close(file)


def line_of(record: Record) -> str:
    """Return a run as a line of the log."""
    measures = {**record["target"], **record["retained"]}
    values = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    run = f"{record['method']}, rate {record['rate']:g}, seed {record['seed']}"
    return f"{run}: {values} ({record['seconds']:.0f} s)"
