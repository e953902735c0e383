"""The demo's picture: old against new in both cases, and what was chosen without the old data."""

from __future__ import annotations

from collections.abc import Sequence
from statistics import mean
from typing import Any

from flowdata.cli.demo_result import (
    BLIND,
    BY_DRIFT,
    FLOW,
    MEAN_WEIGHT,
    DemoResult,
    new_of,
    old_of,
)
from flowdata.report.pictures import BLUE, GREEN, ORANGE
from flowdata.study import LINEAR_PROBE, STANDARD, Record
from flowdata.study.runs import records_by

_GREY, _RED = "#9aa2b1", "#c0392b"
_COLOURS = {STANDARD: BLUE, MEAN_WEIGHT: _GREY, FLOW: GREEN}
_NAMES = {
    STANDARD: "standard fine-tuning (rates below its points)",
    MEAN_WEIGHT: "every sample at FLOW's mean weight, same rates",
    FLOW: "FLOW, same rates",
}
_CHOICES = {  # the shape, colour and name of their marks
    BY_DRIFT: ("*", ORANGE, "chosen by drift, without old data"),
    BLIND: ("X", _RED, "chosen by new accuracy alone"),
}


def draw_demo(panels: Sequence[Any], result: DemoResult) -> None:
    """Draw each case into its axes; in the last one the choices are marked."""
    for axes, (case, records) in zip(panels, result.records.items(), strict=True):
        _draw_fronts(axes, records)
        axes.axhline(result.before, color=_GREY, linestyle="--", linewidth=1)
        axes.set(title=f"{case[:1].upper()}{case[1:]}", xlabel="accuracy on the new task (%)")
        axes.set_ylim(0, 103)
        axes.grid(True, axis="both")
        axes.annotate(
            "before fine-tuning", (0.98, result.before + 1.5), xycoords=("axes fraction", "data"),
            ha="right", fontsize=8, color=_GREY,
        )  # fmt: skip
        axes.annotate("better ↗", (0.98, 0.04), xycoords="axes fraction", ha="right", fontsize=9)
    chosen = result.choices()
    for rule, (shape, colour, name) in _CHOICES.items():
        places = [(new_of(run), old_of(run)) for run in chosen[rule]]
        across, up = zip(*places, strict=True)
        panels[-1].scatter(across, up, marker=shape, s=70, color=colour, zorder=3, label=name)
    panels[0].set_ylabel("accuracy on the old task (%)")
    for axes in panels:
        axes.legend(loc="lower left", fontsize=8)


def _draw_fronts(axes: Any, records: list[Record]) -> None:
    """Draw each method's path over its rates, from the linear probe on."""
    by_method = records_by(records, "method")
    start = _middle(by_method[LINEAR_PROBE])
    for method, colour in _COLOURS.items():
        if method not in by_method:
            continue
        by_rate = records_by(by_method[method], "rate")
        points = [_middle(runs) for runs in by_rate.values()]
        axes.plot(
            *zip(start, *points, strict=True), "-", color=colour, linewidth=1.6, alpha=0.8,
            label=_NAMES[method],
        )  # fmt: skip
        axes.scatter(*zip(*points, strict=True), s=18, color=colour)
        if method == STANDARD:
            for rate, point in zip(by_rate, points, strict=True):
                axes.annotate(
                    f"{rate:g}", point, color=colour, fontsize=8, ha="center",
                    xytext=(0, -13), textcoords="offset points",
                )  # fmt: skip
    axes.scatter(*start, marker="s", s=40, color="black", zorder=3, label="linear probe")
    # A run far below the probe has diverged: its point would press all others together.
    axes.set_xlim(start[0] - 5, 100)


def _middle(runs: list[Record]) -> tuple[float, float]:
    return mean(map(new_of, runs)), mean(map(old_of, runs))
