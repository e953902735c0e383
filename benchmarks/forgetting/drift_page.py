"""The page that answers: does drift tell what was forgotten, and what does choosing by it give?"""

from __future__ import annotations

from collections.abc import Mapping
from statistics import mean

from benchmarks.forgetting.choosing_rules import POINTS, outcomes, rules
from benchmarks.forgetting.drift_measures import agreement_with, few_samples
from flowdata.study import Record
from flowdata.study.table import count, row, spread

OLD = "CIFAR-10 accuracy"
LEAST = 5  # methods and rates that a coefficient takes
PROBE = "new task"  # the probe that is chosen by
Studies = Mapping[str, list[Record]]  # the runs of each target


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has all that the page shows: enough runs of vision, with the probe."""
    methods = {(record["method"], record["rate"]) for record in records}
    return "readouts" in records[0] and len(methods) >= LEAST and ("linear probe", 0.0) in methods


def drift_page(studies: Studies) -> str:
    """Return a Markdown page on the drift in the studies of vision."""
    seeds = {name: len({r["seed"] for r in records}) for name, records in studies.items()}
    counts = ", ".join(
        f"{name} ({len(records)} runs, {count(seeds[name], 'seed')})"
        for name, records in studies.items()
    )
    lines = [
        "# Drift: does it tell what was forgotten, and what does choosing by it give?",
        "",
        f"CIFAR-10's ResNet-20 learns another task: {counts}. Drift never sees CIFAR-10. What was "
        "predicted before the runs: benchmarks/forgetting/registered.md.",
        "",
        "## Does it tell?",
        "",
        "Spearman's coefficient with what was lost of CIFAR-10's accuracy: over all runs, and, "
        "after the stroke, the mean within one rate.",
        "",
        "By the old BatchNorm, as the old task would be served:",
        "",
        *_coefficients(studies, "drift", _lost),
        "",
        "By the tuned BatchNorm:",
        "",
        *_coefficients(studies, "drift by own BatchNorm", _lost_by_own),
        "",
        "On other probes, by the old BatchNorm:",
        "",
        *_coefficients(studies, "drift on other probes", _lost),
        "",
        "By the number of the probe's samples, over all runs, mean of the targets:",
        "",
        *_few(studies),
        "",
        "## What does choosing by it give?",
        "",
        "Average of new and old accuracy of the run chosen among all methods and rates, mean ± "
        "standard deviation over the seeds. Rules with a least or a smallest take it among the "
        f"runs within {POINTS:g} points of the best validation accuracy.",
        "",
        *_choices(studies),
        "",
    ]
    return "\n".join(lines)


def _lost(record: Record) -> float:
    return -float(record["retained"][OLD])


def _lost_by_own(record: Record) -> float:
    return -float(record["readouts"]["own BatchNorm"])


def _coefficients(studies: Studies, drift: str, lost: object) -> list[str]:
    tables = {
        name: agreement_with(records, lost, drift)  # type: ignore[arg-type]
        for name, records in studies.items()
    }
    signs = next(iter(tables.values()))
    lines = [row(["sign", *tables]), row(["---", *["---:"] * len(tables)])]
    for sign in signs:
        cells = [f"{table[sign][0]:.2f} / {table[sign][1]:.2f}" for table in tables.values()]
        lines.append(row([sign, *cells]))
    return lines


def _few(studies: Studies) -> list[str]:
    tables = [few_samples(records, _lost) for records in studies.values()]
    lines = []
    for probe, counts in tables[0].items():
        lines = lines or [
            row(["probe and measure", *counts]),
            row(["---", *["---:"] * len(counts)]),
        ]
        for name in next(iter(counts.values())):
            cells = [f"{mean(table[probe][few][name] for table in tables):.3f}" for few in counts]
            lines.append(row([f"{name}, {probe}", *cells]))
    return lines


def _choices(studies: Studies) -> list[str]:
    lines = [row(["rule", *studies]), row(["---", *["---:"] * len(studies)])]
    for name, rule in rules(PROBE).items():
        cells = [spread(outcomes(records, rule), 1) for records in studies.values()]
        lines.append(row([name, *cells]))
    return lines
