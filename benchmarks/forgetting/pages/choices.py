"""The page that answers: does drift choose well on sets that it was not tried on?

The study of drift chose its measure on five sets (registered.md). The corruptions are new to it.
"""

from __future__ import annotations

from benchmarks.forgetting.pages.choosing_rules import POINTS, average, rules
from benchmarks.forgetting.pages.drift import LARGEST_RATE, OLD, with_all_drifts
from benchmarks.forgetting.pages.drift_measures import agreement_table, agreement_with
from benchmarks.forgetting.pages.several import (
    Studies,
    counts,
    of_whole_seeds,
    table_of_studies,
)
from flowdata.report.markdown import spread
from flowdata.study import LINEAR_PROBE, STANDARD, Record
from flowdata.study.choices import Rule, on_whole_seeds
from flowdata.study.runs import validation_of

PROBES = ("inverted", "noise", "new task")


def choices_page(studies: Studies) -> str:
    """Return a Markdown page on choosing by drift.

    Args:
        studies: the runs of each set, with drifts.
    """
    studies = {name: with_all_drifts(records) for name, records in of_whole_seeds(studies).items()}
    standard = {name: of_standard(records) for name, records in studies.items()}
    return "\n".join(
        [
            "# Does drift choose well?",
            "",
            f"CIFAR-10's ResNet-20 learns other images: {counts(studies)}. Average of new and old "
            "accuracy of the run that a rule chooses among all methods and rates, in %, mean ± "
            "standard deviation over the seeds: by `flowdata.drift.choose` on each probe, and by "
            "rules that need none. The smallest rate and the least drift are taken among the runs "
            f"within {POINTS:g} points of the best validation accuracy, the smallest rate of all "
            "among all, whatever they learn. The linear probe, a new head and nothing else, "
            "competes with the runs.",
            "",
            *_choices(studies),
            "",
            "Among the rates of standard fine-tuning and the linear probe:",
            "",
            *_choices(standard),
            "",
            "## Does it tell?",
            "",
            "Spearman's coefficient with what was lost of CIFAR-10's accuracy, over all runs / the "
            f"mean within one rate, up to {LARGEST_RATE:g}:",
            "",
            *agreement_table(
                {
                    name: agreement_with(records, _lost, "drift", LARGEST_RATE)
                    for name, records in studies.items()
                }
            ),
            "",
        ]
    )


def all_rules() -> dict[str, Rule]:
    """Return the rules by name: the best possible, by drift on each probe, and those without."""
    by_probe = {probe: rules(probe) for probe in PROBES}
    first = by_probe[PROBES[0]]
    return {
        "best possible": first["best possible"],
        **{f"by drift, {probe}": each["by drift"] for probe, each in by_probe.items()},
        **{name: first[name] for name in ("blind", "smallest rate", "least drift")},
        "smallest rate of all": _smallest_of_all,
        LINEAR_PROBE: first[LINEAR_PROBE],
    }


def of_standard(records: list[Record]) -> list[Record]:
    """Return the runs of standard fine-tuning, and of no fine-tuning at all: the linear probe."""
    return [record for record in records if record["method"] in (STANDARD, LINEAR_PROBE)]


def outcomes(rule: Rule, records: list[Record]) -> list[float]:
    """Return the average of new and old, in %, of what a rule chooses on each whole seed."""
    return [average(run) for run in on_whole_seeds(rule, records)]


def _choices(studies: Studies) -> list[str]:
    rows = [
        [name, *(spread(outcomes(rule, records), 1) for records in studies.values())]
        for name, rule in all_rules().items()
    ]
    return table_of_studies("rule", studies, rows)


def _smallest_of_all(runs: list[Record]) -> Record:
    trained = [run for run in runs if run["rate"] > 0]
    return min(trained, key=lambda run: (run["rate"], -validation_of(run)))


def _lost(record: Record) -> float:
    return -float(record["retained"][OLD])
