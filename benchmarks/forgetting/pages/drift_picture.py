"""The picture of drift: what a user without the old data sees, and beside it what was true."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from statistics import mean
from typing import Any

from flowdata.drift import Drift, rank
from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png
from flowdata.study import STANDARD, Record
from flowdata.study.runs import records_by

_LINES = {  # over a method's rates: their colour and name
    STANDARD: (BLUE, "plain fine-tuning, at several learning rates"),
    "FLOW": (GREEN, "FLOW (easy samples count more), at several learning rates"),
}
_OTHERS = "#9aa2b1"
_MARKS = {
    "chosen by drift": ("*", 260, ORANGE),
    "chosen by validation alone": ("X", 110, "#c0392b"),
}


def draw_drift(records: list[Record], probe: str, old: str) -> bytes:
    """Draw the runs of one target, means over the seeds, and return the bytes of a PNG.

    The left panel has the validation accuracy over what the drift says was kept, the right one the
    accuracies on both tasks. The run that `flowdata.drift.rank` chooses on the left is marked in
    both, and so is the one with the best validation accuracy.

    Args:
        records: of a study of vision.
        probe: the name of the drift to draw and to choose by.
        old: the name of the old task's accuracy.
    """
    runs = _means(records, probe, old)
    ranking = rank(
        [(name, run["validation"], run["drift"]) for name, run in runs.items()],
        validation="accuracy",
    )
    marks = {
        "chosen by drift": ranking[0].name,
        "chosen by validation alone": max(runs, key=lambda name: runs[name]["validation"]),
    }
    with figure(10, 4.4, panels=2, sharey=True) as (drawing, (left, right)):
        _draw(left, runs, marks, lambda run: run["drift"].kept, "validation")
        left.set(
            title="What you see: no old data",
            xlabel="what drift says is kept (order only)",
            ylabel="accuracy on the new task (%)",
        )
        _draw(right, runs, marks, lambda run: run["old"], "new")
        right.set(title="What was true", xlabel="accuracy on the old task (%)")
        before = max(record["retained"][old] for record in records if record["rate"] == 0)
        right.axvline(before, color=_OTHERS, linestyle="--", linewidth=1)
        right.annotate(
            "before fine-tuning ",
            (before, 0.02),
            xycoords=("data", "axes fraction"),
            ha="right",
            fontsize=8,
            color=_OTHERS,
        )
        left.annotate("better ↗", (0.99, 0.94), xycoords="axes fraction", ha="right", fontsize=9)
        left.legend(loc="lower left", fontsize=8)
        for axes in (left, right):
            axes.grid(True, axis="both")
        return png(drawing)


def _means(records: list[Record], probe: str, old: str) -> dict[str, dict[str, Any]]:
    """Every method at every rate, by name, with the means of its seeds."""
    runs = {}
    for method, of_method in records_by(records, "method").items():
        for rate, of_rate in records_by(of_method, "rate").items():
            drifts = [record["drift"][probe] for record in of_rate]
            fields = drifts[0] | {
                name: mean(drift[name] for drift in drifts)
                for name in ("kl", "reverse_kl", "cosine", "agreement")
            }
            runs[f"{method} {rate:g}" if rate else method] = {
                "method": method,
                "validation": mean(record["validation"] for record in of_rate),
                "new": mean(record["target"]["accuracy"] for record in of_rate),
                "old": mean(record["retained"][old] for record in of_rate),
                "drift": Drift(**fields),
            }
    return runs


def _draw(
    axes: Any,
    runs: Mapping[str, Mapping[str, Any]],
    marks: Mapping[str, str],
    across: Callable[[Mapping[str, Any]], float],
    up: str,
) -> None:
    """Draw all runs as points, and the marked ones in shapes of their own."""
    for method in dict.fromkeys(run["method"] for run in runs.values()):
        points = [(across(run), run[up]) for run in runs.values() if run["method"] == method]
        colour, label = _LINES.get(method, (_OTHERS, ""))
        axes.scatter(*zip(*points, strict=True), s=26, color=colour, linewidths=0)
        if label:
            axes.plot(*zip(*points, strict=True), color=colour, alpha=0.5, label=label)
    axes.scatter([], [], s=26, color=_OTHERS, linewidths=0, label="other methods and rates")
    for what, name in marks.items():
        shape, size, colour = _MARKS[what]
        place = across(runs[name]), runs[name][up]
        axes.scatter(*place, marker=shape, s=size, color=colour, zorder=3, label=what)
