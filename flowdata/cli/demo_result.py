"""The demo's measurements, and their tables."""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from statistics import mean
from typing import Any

from flowdata.report.markdown import count
from flowdata.study import (
    LINEAR_PROBE,
    STANDARD,
    Kept,
    Record,
    choices,
    kept_at_equal_learning,
    runs_with_items,
)
from flowdata.study.runs import records_by
from flowdata.study.table import measures

FLOW, MEAN_WEIGHT = "FLOW", "mean weight"
WRONG, RIGHT = "a third of the new labels wrong", "all labels right"
OLD = "old task"  # in the records, with "accuracy" behind it
BLIND, BY_DRIFT, BEST = "blind", "by drift", "best possible"
_COLUMN = 20
_RULES = {"blind": BLIND, "by drift, new task": BY_DRIFT, "best": BEST}


@dataclass(frozen=True)
class DemoResult:
    """All measurements of the demo; `str()` gives the tables.

    Attributes:
        before: accuracy in % on the old task before fine-tuning, the mean over the seeds.
        records: the runs of each case, as a study has them.
        picture: path of the PNG.
    """

    before: float
    records: dict[str, list[Record]]
    picture: Path

    def kept(self, case: str) -> dict[str, Kept]:
        """Return what each method of a case keeps at equal learning, by its name."""
        runs = runs_with_items(self.records[case])
        return {each.method: each for each in kept_at_equal_learning(runs, STANDARD, LINEAR_PROBE)}

    def choices(self, case: str = RIGHT) -> dict[str, list[Record]]:
        """Return the run that each rule chooses in a case, by seed."""
        chosen = choices(self.records[case], _average)
        return {name: chosen[rule] for rule, name in _RULES.items()}

    def to_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-like."""
        return {
            "before": self.before,
            "cases": {case: [_figures(run) for run in runs] for case, runs in self.records.items()},
            "kept at equal learning": {
                case: {
                    name: [each.difference, each.low, each.high]
                    for name, each in self.kept(case).items()
                }
                for case in self.records
            },
            "chosen": {
                rule: [_figures(run) for run in runs] for rule, runs in self.choices().items()
            },
            "picture": str(self.picture),
        }

    def __str__(self) -> str:
        seeds = len({run["seed"] for run in self.records[RIGHT]})
        lines = [
            "Upright digits first (the old task), then the same turned by a quarter (the new one).",
            f"Accuracy in %, new / old, means of {count(seeds, 'seed')}; the old task before "
            f"fine-tuning: {self.before:.1f}.",
        ]
        for case in self.records:
            lines += ["", *self._table(case)]
        lines += ["", "Chosen among all of these, each seed for itself:"]
        names = {
            BLIND: "blind, by held-out samples of the new task",
            BY_DRIFT: "by drift, without the old data either",
            BEST: "best possible, by the average of both",
        }
        for rule, runs in self.choices().items():
            rates = ", ".join(sorted({_name(run) for run in runs}))
            lines.append(f"  {names[rule]:44}{accuracies(runs):>13}   {rates}")
        return "\n".join([*lines, "", f"Picture: {self.picture}"])

    def _table(self, case: str) -> list[str]:
        by_method = records_by(self.records[case], "method")
        probe = by_method.pop(LINEAR_PROBE)
        by_rate = {name: records_by(runs, "rate") for name, runs in by_method.items()}
        order = [name for name in (STANDARD, MEAN_WEIGHT, FLOW) if name in by_rate]
        lines = [f"{case[:1].upper()}{case[1:]}; the linear probe has {accuracies(probe)}"]
        lines.append(_row("rate", order))
        for rate in by_rate[STANDARD]:
            lines.append(_row(f"{rate:g}", [accuracies(by_rate[name][rate]) for name in order]))
        for name, each in self.kept(case).items():
            if name != STANDARD:
                lines.append(
                    f"{name} at equal learning: {each.difference:+.1f} of the old task "
                    f"({each.low:+.1f} to {each.high:+.1f})"
                )
        return lines


def accuracies(runs: list[Record]) -> str:
    """Return the mean accuracies of runs on the new and the old task, in a cell."""
    return f"{mean(map(new_of, runs)):.1f} / {mean(map(old_of, runs)):.1f}"


def new_of(run: Record) -> float:
    """Return a run's accuracy on the new task, in %."""
    return float(run["target"]["accuracy"])


def old_of(run: Record) -> float:
    """Return a run's accuracy on the old task, in %."""
    return float(run["retained"][f"{OLD} accuracy"])


def _average(run: Record) -> float:
    return measures(run)["average"]


def _figures(run: Record) -> dict[str, Any]:
    key = {name: run[name] for name in ("method", "rate", "seed", "validation")}
    return key | {"new": new_of(run), "old": old_of(run)}


def _name(run: Record) -> str:
    return f"{run['method']} {run['rate']:g}" if run["rate"] else str(run["method"])


def _row(name: str, cells: list[str]) -> str:
    return f"{name:8}" + "".join(f"{cell:>{_COLUMN}}" for cell in cells)
