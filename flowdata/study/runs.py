"""A study: every method at every learning rate of its grid, on every seed.

Every finished run is one JSON line of a results file. A study that was stopped goes on where it
was, because a run that has its line is not run again. Seeds are the outermost loop, so that an
unfinished study is a whole study of fewer seeds, and processes with different seeds can share the
work. A method's learning rate is chosen by the validation score on the *new* task alone, as
somebody without the old data has to choose it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, TypeAlias

import torch

from flowdata._common.notices import say
from flowdata._common.processor import processor
from flowdata.study.methods import STANDARD
from flowdata.study.records import Record, append_record, as_json, checked, key_of, read_records

Runs: TypeAlias = dict[str, list[Record]]  # each method's records, in the order of their seeds
Runner: TypeAlias = Callable[[str, float, int], Record]  # method, rate, seed → measures


def run_study(
    path: str | Path,
    options: dict[str, Any],
    run: Runner,
    *,
    methods: Mapping[str, Sequence[float]],
    seeds: Iterable[int],
) -> list[Record]:
    """Run what the results file lacks, and return the records of this study.

    Args:
        path: the results file, of JSON lines; new runs are appended to it.
        options: what a run depends on beside method, rate and seed. Runs in the file with other
            options don't count. ``study`` and ``target`` among them make the page's title.
        run: takes method, rate and seed, and returns ``validation`` (higher is better), ``target``
            and ``retained`` (mappings of measures by name) and whatever else is worth a note. A
            measure whose name ends in ``accuracy`` is in %, and more is better; of all other
            measures less is better. With ``drift``, `Drift.to_dict()` by the names of probes, the
            page says what each probe would choose, without the old data, beside the blind choice.
            Numbers may be tensors or NumPy's; one that is not finite says that the run diverged.
        methods: the methods' names, each with the learning rates to run it at, see `grids`.
        seeds: the seeds of the runs.

    Returns:
        Records under these options, older ones included.

    Raises:
        TypeError, ValueError: what `run` returned lacks a field, or has one that makes no page.
    """
    path = Path(path)
    options = json.loads(as_json(options))  # equal to what comes back from the file
    keys: list[Record] = [
        {"method": method, "rate": rate, "seed": seed, "options": options}
        for seed in seeds
        for method, rates in methods.items()
        for rate in rates
    ]
    keys = json.loads(as_json(keys))
    keys_in_file = {key_of(record) for record in read_records(path)}
    for key in keys:
        if key_of(key) in keys_in_file:
            continue
        start = perf_counter()
        measures = run(key["method"], key["rate"], key["seed"])
        # The key comes first, and no measure of its name replaces it.
        record = key | checked(measures, where=_name(key)) | key
        seconds = round(perf_counter() - start, 2)
        record |= {"seconds": seconds, "torch": torch.__version__, "processor": processor()}
        append_record(path, record)
        say(line_of(record))
    return [record for record in read_records(path) if record["options"] == options]


def validation_of(record: Record) -> float:
    """Return a run's score; a run that diverged comes last."""
    return finite_or_last(float(record["validation"]))


def finite_or_last(score: float) -> float:
    """Return a score, of which more is better, or the least of all where it is no number."""
    return score if math.isfinite(score) else -math.inf


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
    """Return each method's rate with the highest mean validation score; of equals the smaller.

    Only those rates count at which the method was run on the most seeds.
    """
    return {
        method: max(rates, key=lambda rate: mean(map(validation_of, rates[rate])))
        for method, rates in swept_runs(records).items()
    }


def edges(records: Iterable[Record]) -> dict[str, list[str]]:
    """Return the methods whose grid may end too early, by side: ``larger`` or ``smaller``.

    A grid is long enough on a side if a rate there is no better than the chosen one::

        rate         0.01    0.03    0.1
        validation     81      84     86   ← chosen
                                          a larger rate may be better still

    Two rates are compared on the seeds that both were run on; one seed is enough. Methods with a
    single rate don't count.
    """
    records = list(records)
    best_rates = chosen_rates(records)
    methods_by_side: dict[str, list[str]] = {"larger": [], "smaller": []}
    for method, rates in _validation_scores(records).items():
        best = best_rates[method]
        # The chosen rate is no better than itself, so that the list is never empty.
        limits = [rate for rate, scores in rates.items() if _is_no_better(scores, rates[best])]
        if len(rates) > 1:
            if max(limits) == best:
                methods_by_side["larger"].append(method)
            if min(limits) == best:
                methods_by_side["smaller"].append(method)
    return methods_by_side


def _is_no_better(scores: Mapping[int, float], best: Mapping[int, float]) -> bool:
    """Whether scores, by seed, are no better than others on the seeds of both."""
    seeds = scores.keys() & best.keys()
    return bool(seeds) and sum(scores[s] for s in seeds) <= sum(best[s] for s in seeds)


def _validation_scores(
    records: Iterable[Record],
) -> dict[str, dict[float, dict[int, float]]]:
    """Each method's validation scores, by rate and seed."""
    scores: dict[str, dict[float, dict[int, float]]] = {}
    for record in records:
        scores_at_rate = scores.setdefault(record["method"], {}).setdefault(record["rate"], {})
        scores_at_rate[record["seed"]] = validation_of(record)
    return scores


def records_by(records: Iterable[Record], field: str) -> dict[Any, list[Record]]:
    """Return the records by the value of a field, in the order of the values."""
    groups: dict[Any, list[Record]] = {}
    for record in records:
        groups.setdefault(record[field], []).append(record)
    return dict(sorted(groups.items()))


def whole_seeds(records: Iterable[Record]) -> dict[int, list[Record]]:
    """Return the runs of each seed that has as many runs as any other, in the seeds' order."""
    runs = records_by(records, "seed")
    most = max(map(len, runs.values()), default=0)
    return {seed: of_seed for seed, of_seed in runs.items() if len(of_seed) == most}


def chosen_runs(records: Iterable[Record]) -> Runs:
    """Return each method's runs at the rate chosen for it, in the order of their seeds."""
    records = list(records)
    sweeps = swept_runs(records)
    return {method: sweeps[method][rate] for method, rate in chosen_rates(records).items()}


def runs_by_rate(records: Iterable[Record]) -> dict[float, Runs]:
    """Return all methods' runs at each rate of standard fine-tuning.

    Only those rates count at which standard fine-tuning was run on the most seeds. A method that
    doesn't train has no rate and appears at each of them.
    """
    records = list(records)
    methods = dict.fromkeys(record["method"] for record in records)
    rateless_methods = {record["method"] for record in records if record["rate"] == 0}
    return {
        rate: _runs_at({m: 0.0 if m in rateless_methods else rate for m in methods}, records)
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
    return {name: method_runs for name, method_runs in runs.items() if method_runs}


def line_of(record: Record) -> str:
    """Return a run as a line of the log."""
    measures = {**record["target"], **record["retained"]}
    values = ", ".join(f"{name} {value:.4g}" for name, value in measures.items())
    return f"{_name(record)}: {values} ({record['seconds']:.0f} s)"


def _name(record: Record) -> str:
    return f"{record['method']}, rate {record['rate']:g}, seed {record['seed']}"
