"""A study's runs as a Markdown page: tables of measures, and tests of their differences."""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from itertools import chain
from statistics import mean, stdev
from typing import Any

from flowdata.report.markdown import DIVERGED, count, spread, table
from flowdata.study.choices import on_whole_seeds, rules
from flowdata.study.equal_learning import SHARES, Kept, kept_at_equal_learning, runs_with_items
from flowdata.study.extras import load_extra
from flowdata.study.methods import LINEAR_PROBE, METHODS, STANDARD
from flowdata.study.records import Record
from flowdata.study.runs import Runs, chosen_runs, edges, runs_by_rate, whole_seeds

_ROUNDING = 1e-9  # of measures, as a share of their differences
BEST_RATE_NOTE = (
    "At the rate that is best, for each method, on validation samples of the new task "
    "(of the rates that it was run at on the most seeds):"
)


def studies(
    records: Iterable[Record], order: Sequence[str] = tuple(METHODS)
) -> list[tuple[dict[str, Any], list[Record]]]:
    """Return the records by their options: only runs with the same options are compared.

    Args:
        records: all records of a results file.
        order: the order of the methods; other methods come after these, in the order of their runs.
    """
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(json.dumps(record["options"], sort_keys=True), []).append(record)
    place = {method: number for number, method in enumerate(order)}
    return [
        (group[0]["options"], sorted(group, key=lambda r: place.get(r["method"], len(place))))
        for group in groups.values()
    ]


def measures(record: Record) -> dict[str, float]:
    """Return a run's measures by name, and their average if all are accuracies, of both tasks."""
    values = {
        **{f"target {name}": value for name, value in record["target"].items()},
        **record["retained"],
    }
    is_of_both = record["target"] and record["retained"]
    if is_of_both and all(name.endswith("accuracy") for name in values):
        values["average"] = mean(
            [mean(record["target"].values()), mean(record["retained"].values())]
        )
    return values


def report(options: Mapping[str, Any], records: list[Record]) -> str:
    """Return a study's Markdown page.

    Args:
        options: the study's options.
        records: what `run_study` returned; the methods appear in the records' order.

    Raises:
        ImportError: scipy, which tests differences over two or more seeds, is not installed.
    """
    runs = chosen_runs(records)
    seeds = count(max(len(method_runs) for method_runs in runs.values()), "seed")
    settings = ", ".join(f"{name} {value}" for name, value in options.items())
    title = ", ".join(str(options[name]) for name in ("study", "target") if name in options)
    lines = [
        f"# Forgetting: {title}" if title else "# Forgetting",
        "",
        f"{settings}. {len(records)} runs, up to {seeds}.",
        "",
        BEST_RATE_NOTE,
        "",
        *_table(runs),
        "",
        *_edges(records),
        *_over_rates(records),
        *_choices(records),
        *_equal_learning(records),
        "Differences over the seeds, paired: mean ± standard deviation (p of a t-test).",
        "",
        *_comparisons(runs),
    ]
    for rate, at_rate in runs_by_rate(records).items():
        if len(at_rate) > 1:
            lines += ["", f"All at rate {rate:g}:", "", *_table(at_rate), ""]
            lines += _comparisons(at_rate)
    return "\n".join([*lines, ""])


def paired_difference(runs: list[Record], others: list[Record], name: str) -> str:
    """Return the difference of a measure, paired by seed: mean ± standard deviation (p)."""
    values = {record["seed"]: measures(record)[name] for record in runs}
    other_values = {record["seed"]: measures(record)[name] for record in others}
    differences = [
        value - other_values[seed] for seed, value in values.items() if seed in other_values
    ]
    if not all(map(math.isfinite, differences)):
        return DIVERGED
    places = digits(name)
    if len(differences) < 2:
        return f"{mean(differences):+.{places}f}" if differences else "–"
    deviation = stdev(differences)
    return f"{mean(differences):+.{places}f} ± {deviation:.{places}f} ({paired_p(differences)})"


def paired_p(differences: list[float]) -> str:
    """Return the two-sided p of a paired t-test, in words; "–" where differences have no spread."""
    if not any(differences):
        return "p 1"
    if stdev(differences) <= _ROUNDING * max(map(abs, differences)):  # the test divides by it
        return "–"
    stats = load_extra("scipy.stats", "paired tests")
    p = float(stats.ttest_1samp(differences, 0.0).pvalue)
    return f"p {p:.3f}" if p >= 0.001 else "p < 0.001"


def _table(runs: Runs) -> list[str]:
    names = list(measures(next(iter(runs.values()))[0]))
    rows = [
        [method, f"{records[0]['rate']:g}", *(_spread_of(records, name) for name in names)]
        for method, records in runs.items()
    ]
    return table(["method", "rate", *names], rows)


def _spread_of(runs: list[Record], name: str) -> str:
    """The mean and the standard deviation of a measure."""
    return spread([measures(run)[name] for run in runs], digits(name))


def _edges(records: Iterable[Record]) -> list[str]:
    """Sentences on the methods that may do better beyond the rates of their grid."""
    sentences = [
        f"A {side} rate was not tried and may be better: {'; '.join(methods)}."
        for side, methods in edges(records).items()
        if methods
    ]
    return [" ".join(sentences), ""] if sentences else []


def _over_rates(records: list[Record]) -> list[str]:
    """A table with a row for each method that trains and a column for each rate."""
    records = [record for record in records if record["rate"] > 0]
    rates = sorted({record["rate"] for record in records})
    if len(rates) < 2:
        return []
    names = list(measures(records[0]))
    most = len({record["seed"] for record in records})
    title = f"At each rate ({' / '.join(names)}; in brackets how many seeds, where not {most}):"
    runs: dict[tuple[str, float], list[Record]] = {}
    for record in records:
        runs.setdefault((record["method"], record["rate"]), []).append(record)
    rows = [
        [method, *(_means_and_seeds(runs.get((method, rate), []), names, most) for rate in rates)]
        for method in dict.fromkeys(method for method, _ in runs)
    ]
    return [title, "", *table(["method", *(f"{rate:g}" for rate in rates)], rows), ""]


def _choices(records: list[Record]) -> list[str]:
    """A table of what each rule chooses among all runs that have a drift."""
    records = [record for record in records if "drift" in record]
    if len({(record["method"], record["rate"]) for record in records}) < 2:
        return []
    names = list(measures(records[0]))
    average = "average" in names
    by_rule, left_out = {}, []
    for name, rule in rules(
        records, (lambda r: measures(r)["average"]) if average else None
    ).items():
        try:
            by_rule[name] = on_whole_seeds(rule, records)
        except ValueError as error:
            left_out.append(f"Left out, {name}: {error}.")
    rows = [
        [rule, *(_spread_of(runs, name) for name in names), methods_and_rates(runs)]
        for rule, runs in by_rule.items()
    ]
    title = (
        "Chosen among all methods and rates, on each seed whose runs are all there: blind, by "
        "validation alone; by drift, validation and what the probe says was kept "
        "(`flowdata.drift.choose`)"
    )
    title += "; best, which takes the old data to know:" if average else ":"
    lines = [title, "", *table(["chosen", *names, "runs"], rows, words=("runs",)), ""]
    return [*lines, *left_out, ""] if left_out else lines


def methods_and_rates(runs: Iterable[Record]) -> str:
    """Return the methods of runs, each with its rate, once each."""
    return ", ".join(dict.fromkeys(f"{run['method']} {run['rate']:g}" for run in runs))


def _equal_learning(records: list[Record]) -> list[str]:
    """A table of what methods keep where they have learned as much."""
    records = [record for record in records if "hits" in record]
    seeds = whole_seeds(records)
    runs = runs_with_items(chain.from_iterable(seeds.values()))
    runs = {key: by_seed for key, by_seed in runs.items() if by_seed.keys() == seeds.keys()}
    if not {STANDARD, LINEAR_PROBE} <= {method for method, _ in runs}:
        return []
    shares = [f"at {share:.0%}" for share in SHARES]
    rows = []
    for kept in kept_at_equal_learning(runs, STANDARD, LINEAR_PROBE):
        old = ["–" if math.isnan(value) else f"{value:.1f}" for value in kept.at]
        is_standard = kept.method == STANDARD
        figures = ["", ""] if is_standard else [difference(kept), f"{kept.p:.3f}"]
        rows.append([kept.method, f"{kept.rates}", *old, *figures])
    title = (
        f"At equal learning ({count(len(seeds), 'seed')}): old accuracy where a method's front "
        f"over its rates has learned a share of what {STANDARD} fine-tuning learns over the "
        f"{LINEAR_PROBE}; the mean difference from it over all that both learn, with 95 % of the "
        "draws of seeds and test items; p by Holm:"
    )
    return [title, "", *table(["method", "rates", *shares, "difference", "p"], rows), ""]


def difference(kept: Kept) -> str:
    """Return a difference at equal learning, in a cell: the mean, and its interval."""
    return f"{kept.difference:+.1f} ({kept.low:+.1f} to {kept.high:+.1f})"


def _means_and_seeds(runs: list[Record], names: list[str], most: int) -> str:
    """The means of some runs, and the number of their seeds if it is less than `most`."""
    return means(runs, names) + f" ({len(runs)})" * (0 < len(runs) < most)


def _comparisons(runs: Runs) -> list[str]:
    """A table of each method against standard fine-tuning, and of each sum against its summands."""
    names = list(measures(next(iter(runs.values()))[0]))
    rows = []
    for method, records in runs.items():
        summands = method.split(" + ") if " + " in method else []
        for other in [STANDARD, *summands]:
            if other in runs and other != method:
                cells = [paired_difference(records, runs[other], name) for name in names]
                rows.append([method, other, *cells])
    return table(["method", "against", *names], rows, words=("against",))


def means(runs: list[Record], names: list[str]) -> str:
    """Return the means of several measures, in one cell."""
    if not runs:
        return "–"
    values = [mean(measures(record)[name] for record in runs) for name in names]
    return " / ".join(
        f"{v:.{digits(name)}f}" if math.isfinite(v) else DIVERGED
        for v, name in zip(values, names, strict=True)
    )


def digits(name: str) -> int:
    """Return how many digits after the point a measure is shown with."""
    if name.endswith(("accuracy", "average")):
        return 1
    return 2 if name.endswith("perplexity") else 3
