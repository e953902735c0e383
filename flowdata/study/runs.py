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
import os
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from statistics import mean
from time import perf_counter
from typing import Any, TypeAlias

import numpy as np
import torch
from torch import Tensor

from flowdata._common.notices import logger, say
from flowdata._common.processor import processor
from flowdata._common.real_numbers import as_float, as_python
from flowdata.study.methods import STANDARD

_MEASURES = ("target", "retained")
Record: TypeAlias = dict[str, Any]
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
    options = json.loads(_json(options))  # equal to what comes back from the file
    keys: list[Record] = [
        {"method": method, "rate": rate, "seed": seed, "options": options}
        for seed in seeds
        for method, rates in methods.items()
        for rate in rates
    ]
    keys = json.loads(_json(keys))
    keys_in_file = {key_of(record) for record in read_records(path)}
    for key in keys:
        if key_of(key) in keys_in_file:
            continue
        start = perf_counter()
        measures = run(key["method"], key["rate"], key["seed"])
        record = key | _checked(measures, where=_name(key)) | key
        seconds = round(perf_counter() - start, 2)
        record |= {"seconds": seconds, "torch": torch.__version__, "processor": processor()}
        append_record(path, record)
        say(line_of(record))
    return [record for record in read_records(path) if record["options"] == options]


def _checked(measures: Any, where: str) -> Record:
    """What a run returned, its measures as floats; raise for what no page can be made of."""
    if not isinstance(measures, Mapping):
        raise TypeError(
            f"{where}: run must return a mapping with validation, target and retained, got "
            f"{type(measures).__name__}"
        )
    missing = [name for name in ("validation", *_MEASURES) if name not in measures]
    if missing:
        raise ValueError(
            f"{where}: run returned no {missing[0]!r}, only {', '.join(map(repr, measures))}; it "
            "must return validation, a number, and target and retained, measures by name"
        )
    checked: Record = {"validation": _number(measures["validation"], f"{where}: validation")}
    for kind in _MEASURES:
        by_name = measures[kind]
        if not isinstance(by_name, Mapping):
            raise TypeError(
                f"{where}: {kind} must hold measures by name, such as {{'accuracy': 80.0}}, got "
                f"{by_name!r}"
            )
        checked[kind] = {
            str(name): _number(value, f"{where}: {kind}[{name!r}]")
            for name, value in by_name.items()
        }
    drifts = measures.get("drift", {})
    if not isinstance(drifts, Mapping) or not all(isinstance(d, Mapping) for d in drifts.values()):
        raise TypeError(
            f"{where}: drift must hold Drift.to_dict() by the names of probes, such as "
            f"{{'new task': meter(model).to_dict()}}, got {drifts!r}"
        )
    return {**measures, **checked}


def _number(value: Any, what: str) -> float:
    number = as_float(value)
    if number is None:
        raise TypeError(f"{what} must be a number, got {value!r}")
    return number


def _json(value: Any) -> str:
    """A value as JSON: of NumPy and PyTorch the numbers, of all else that JSON lacks the words."""

    def plain(part: Any) -> Any:
        number = as_python(part)
        if number is not part:
            return number
        return part.tolist() if isinstance(part, Tensor | np.ndarray) else str(part)

    return json.dumps(value, default=plain)


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


def key_of(record: Record) -> str:
    """Return a text that identifies a run: its options, method, rate and seed."""
    return json.dumps(
        [record[name] for name in ("options", "method", "rate", "seed")], sort_keys=True
    )


def read_records(path: str | Path) -> list[Record]:
    """Return the runs of a results file; a line that a killed process left torn is skipped."""
    path = Path(path)
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
    # A process that was killed may have left half a line. A line break ends it here: the new line
    # would else be a part of it and be skipped with it.
    is_torn = path.exists() and not path.read_bytes().endswith(b"\n")
    text = "\n" * is_torn + _json(record) + "\n"
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
    return f"{_name(record)}: {values} ({record['seconds']:.0f} s)"


def _name(record: Record) -> str:
    return f"{record['method']}, rate {record['rate']:g}, seed {record['seed']}"
