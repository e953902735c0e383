"""The page that answers: does drift tell what was forgotten, and what does choosing by it give?"""

from __future__ import annotations

from collections.abc import Callable
from statistics import mean

from benchmarks.forgetting.evidence import ANCHOR, FLOW_AND_ANCHOR
from benchmarks.forgetting.pages.choosing_rules import POINTS, average, rules
from benchmarks.forgetting.pages.drift_measures import (
    OF_DRIFT,
    agreement_table,
    agreement_with,
    few_samples,
)
from benchmarks.forgetting.pages.fronts import kept_on, table_of_sets
from benchmarks.forgetting.pages.several import Studies, counts, of_whole_seeds
from flowdata.report.markdown import spread, table
from flowdata.study import LINEAR_PROBE, STANDARD, Record
from flowdata.study.choices import Rule, on_whole_seeds

OLD = "CIFAR-10 accuracy"
LEAST = 5  # methods and rates that a coefficient takes
PROBE = "new task"  # the probe that was registered to be chosen by
PROBES = (PROBE, "noise", "inverted")
ANCHORED = (ANCHOR, FLOW_AND_ANCHOR)
# Within larger rates all runs have lost all that they can.
LARGEST_RATE = 0.03


def can_tell(records: list[Record]) -> bool:
    """Return whether a study has all that the page shows: enough runs of vision, with the probe."""
    methods = {(record["method"], record["rate"]) for record in records}
    has_measures = {"readouts", "rivals", "drift on few"} <= records[0].keys()
    return has_measures and len(methods) >= LEAST and (LINEAR_PROBE, 0.0) in methods


def drift_page(studies: Studies) -> str:
    """Return a Markdown page on the drift in the studies of vision."""
    studies = {name: with_all_drifts(records) for name, records in studies.items()}
    lines = [
        "# Drift: does it tell what was forgotten, and what does choosing by it give?",
        "",
        f"CIFAR-10's ResNet-20 learns another task: {counts(studies)}. Drift never sees CIFAR-10. "
        "What was predicted before the runs: benchmarks/forgetting/registered.md.",
        "",
        *_what_it_tells(studies),
        "",
        *_what_choosing_gives(studies),
        "",
        *_held(studies),
    ]
    return "\n".join(lines)


def _what_it_tells(studies: Studies) -> list[str]:
    free = _without_anchor(studies)
    return [
        "## Does it tell?",
        "",
        "Spearman's coefficient with what was lost of CIFAR-10's accuracy, over all runs but the "
        "output anchor's; after the stroke, the mean within one rate, "
        f"up to {LARGEST_RATE:g}. By the old BatchNorm, as the old task would be served:",
        "",
        *_coefficients(free, "drift", _lost),
        "",
        "By the tuned BatchNorm:",
        "",
        *_coefficients(free, "drift by own BatchNorm", _lost_by_own),
        "",
        "With the runs of the output anchor, by the old BatchNorm. The anchor holds the KL on the "
        "new task's own images, so that this says less of what was lost elsewhere:",
        "",
        *_coefficients(studies, "drift", _lost),
        "",
        "By the number of the probe's samples, over all runs but the anchor's, means of targets:",
        "",
        *_few(free),
    ]


def _what_choosing_gives(studies: Studies) -> list[str]:
    of_standard = _only(studies, lambda record: record["method"] == STANDARD)
    return [
        "## What does choosing by it give?",
        "",
        "Average of new and old accuracy of the run chosen among all methods and rates, mean ± "
        "standard deviation over the seeds, by `flowdata.drift.choose` on each probe and by rules "
        "that don't need it. Rules with a least or a smallest take it among the "
        f"runs within {POINTS:g} points of the best validation accuracy.",
        "",
        *_choices(studies),
        "",
        "Without the output anchor, which is what was registered:",
        "",
        *_choices(_without_anchor(studies)),
        "",
        "Among the rates of standard fine-tuning alone:",
        "",
        *_choices(of_standard),
    ]


def with_all_drifts(records: list[Record]) -> list[Record]:
    """Return the records with the drifts on all probes in one place."""
    return [
        record | {"drift": record["drift"] | record["drift on other probes"]} for record in records
    ]


def _without_anchor(studies: Studies) -> Studies:
    return _only(studies, lambda record: record["method"] not in ANCHORED)


def _only(studies: Studies, is_taken: Callable[[Record], bool]) -> Studies:
    return {name: list(filter(is_taken, records)) for name, records in studies.items()}


def _lost(record: Record) -> float:
    return -float(record["retained"][OLD])


def _lost_by_own(record: Record) -> float:
    return -float(record["readouts"]["own BatchNorm"])


def _coefficients(studies: Studies, drift: str, lost: Callable[[Record], float]) -> list[str]:
    return agreement_table(
        {
            name: agreement_with(records, lost, drift, LARGEST_RATE)
            for name, records in studies.items()
        }
    )


def _few(studies: Studies) -> list[str]:
    coefficients = [few_samples(records, _lost) for records in studies.values()]
    sizes = list(next(iter(coefficients[0].values())))
    rows = []
    for probe in coefficients[0]:
        for name in OF_DRIFT:
            means = (mean(each[probe][size][name] for each in coefficients) for size in sizes)
            rows.append([f"{name}, {probe}", *(f"{value:.3f}" for value in means)])
    return table(["probe and measure", *sizes], rows)


def _choices(studies: Studies) -> list[str]:
    methods = {record["method"] for records in studies.values() for record in records}
    by_probe = {probe: rules(probe) for probe in PROBES}
    all_rules = {
        "best possible": by_probe[PROBE].pop("best possible"),
        **{f"by drift, {probe}": of_probe.pop("by drift") for probe, of_probe in by_probe.items()},
        **by_probe[PROBE],
    }
    rows = [
        [name, *(_outcome(rule, records) for records in studies.values())]
        for name, rule in all_rules.items()
        if name != LINEAR_PROBE or name in methods
    ]
    return table(["rule", *studies], rows)


def _outcome(rule: Rule, records: list[Record]) -> str:
    """What a rule's choices come to: the average of new and old, in %, over the whole seeds."""
    return spread([average(run) for run in on_whole_seeds(rule, records)], 1)


def _held(studies: Studies) -> list[str]:
    """What each method holds of the old task, where the answers to each item were kept."""
    if not all("hits" in record for records in studies.values() for record in records):
        return []
    studies = of_whole_seeds(studies)
    kept = {name: kept_on(records) for name, records in studies.items()}
    return [
        "## What holds the old task?",
        "",
        "CIFAR-10's accuracy where a method has learned as much, by the old BatchNorm: the mean "
        "difference from standard fine-tuning in points, each over the rates of its own, and where "
        "95 % of the draws of seeds and test items lie. A star: p, corrected by Holm for the "
        "target's methods, is below 0.05.",
        "",
        *table_of_sets(kept, studies),
        "",
    ]
