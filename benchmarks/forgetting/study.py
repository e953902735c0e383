"""A study: each method's learning rate swept on the first seed, the best one on all seeds.

Beside its own best rate, each method is run at that of standard fine-tuning: one table answers
what a user gets who tunes the rate for the method, the other who adds it to a loop as it is.

Every finished run is one JSON line of a results file, so a study that was stopped goes on where
it was: a run whose line is there is not run again. The learning rate is chosen by the validation
score on the *new* task alone, as somebody without the old data has to choose it.
"""

from __future__ import annotations

import json
import math
import os
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from time import perf_counter
from typing import Any

import torch

Record = dict[str, Any]
Runner = Callable[[str, float, int], Record]  # method, rate, seed -> what was measured

STANDARD = "standard"  # the method whose rate all others are run at, too
_FURTHER = 3  # steps by which a sweep may go beyond each end of its grid


def run_study(
    path: Path,
    options: dict[str, Any],
    run: Runner,
    *,
    methods: Mapping[str, Sequence[float]],
    seeds: int,
) -> list[Record]:
    """Run what is missing from the results file `path` and return this study's records.

    Args:
        path: JSON lines, appended to.
        options: all that a run depends on beside method, rate and seed; runs under other
            options don't count.
        run: returns ``validation`` (higher is better), ``target`` and ``retained`` (mappings of
            measures) and whatever else is worth a note.
        methods: the grid of rates for each, in the order they run; see `sweep`. ``"standard"``,
            if it is there, goes first.
        seeds: how many; the sweep is on seed 0.
    """
    methods = dict(sorted(methods.items(), key=lambda item: item[0] != STANDARD))
    options = json.loads(json.dumps(options))
    done = {key_of(record): record for record in read_records(path)}

    def measured(method: str, rate: float, seed: int) -> Record:
        wanted = {"method": method, "rate": rate, "seed": seed, "options": options}
        if key_of(wanted) not in done:
            start = perf_counter()
            record = wanted | run(method, rate, seed)
            record |= {"seconds": round(perf_counter() - start, 2), "torch": torch.__version__}
            append_record(path, record)
            done[key_of(wanted)] = record
            print(line_of(record), file=sys.stderr, flush=True)
        return done[key_of(wanted)]

    def done_under(options: dict[str, Any]) -> list[Record]:
        return [record for record in done.values() if record["options"] == options]

    def score(method: str, rate: float) -> float:
        return validation_of(measured(method, rate, 0))

    for method, rates in methods.items():
        best = sweep(lambda rate, method=method: score(method, rate), rates)
        common = chosen_rates(done_under(options)).get(STANDARD, best) if len(rates) > 1 else best
        for rate in dict.fromkeys((best, common)):
            for seed in range(seeds):
                measured(method, rate, seed)
    return done_under(options)


def sweep(score: Callable[[float], float], rates: Sequence[float]) -> float:
    """Return the rate of the highest score, the smaller one of equals.

    While the best rate is the first or the last, a grid of two or more goes on along 1, 3, 10, …
    """
    scores = {rate: score(rate) for rate in rates}
    for _ in range(_FURTHER if len(scores) > 1 else 0):
        best = best_rate(scores)
        if best not in (min(scores), max(scores)) or len(set(scores.values())) == 1:
            break
        further = _beyond(best, up=best == max(scores))
        scores[further] = score(further)
    return best_rate(scores)


def _beyond(rate: float, *, up: bool) -> float:
    """The next of …, 0.1, 0.3, 1, 3, …"""
    series = [float(f"{digit}e{power}") for power in range(-12, 3) for digit in (1, 3)]
    if up:
        return next(value for value in series if value > rate * 1.001)
    return next(value for value in reversed(series) if value < rate / 1.001)


def best_rate(scores: dict[float, float]) -> float:
    """Return the rate of the highest score, the smaller one of equals."""
    return max(sorted(scores), key=lambda rate: scores[rate])


def validation_of(record: Record) -> float:
    """Return a run's score; a run that diverged comes last."""
    value = float(record["validation"])
    return value if math.isfinite(value) else -math.inf


def chosen_rates(records: Iterable[Record]) -> dict[str, float]:
    """Return each method's rate, read off the runs of the first seed."""
    swept: dict[str, dict[float, float]] = {}
    for record in records:
        if record["seed"] == 0:
            swept.setdefault(record["method"], {})[record["rate"]] = validation_of(record)
    return {method: best_rate(scores) for method, scores in swept.items()}


def key_of(record: Record) -> str:
    """Return what makes a run the same run."""
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
            print(f"{path}: a torn line is left out: {text[:60]!r}", file=sys.stderr)
    return records


def append_record(path: Path, record: Record) -> None:
    """Add a run as one line, in one write: several processes may share the file."""
    path.parent.mkdir(parents=True, exist_ok=True)
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
    shown = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    where = f"{record['method']}, rate {record['rate']:g}, seed {record['seed']}"
    return f"{where}: {shown} ({record['seconds']:.0f} s)"
