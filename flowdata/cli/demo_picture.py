"""The demo's picture: new against old in both cases, and what was chosen without the old data."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
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
from flowdata.drift import Drift
from flowdata.report.pictures import BLUE, GREEN, ORANGE
from flowdata.study import LINEAR_PROBE, STANDARD, Record
from flowdata.study.runs import records_by

SIZE = (9.5, 5.2)  # inches
_TITLE = "A network that reads upright digits (the old task) learns turned ones (the new task)"
_GREY, _RED = "#9aa2b1", "#c0392b"
_COLOURS = {STANDARD: BLUE, MEAN_WEIGHT: _GREY, FLOW: GREEN}
_NAMES = {
    STANDARD: "standard fine-tuning (learning rates beside its points)",
    MEAN_WEIGHT: "every sample at FLOW's mean weight, same rates",
    FLOW: "FLOW (easy samples count more), same rates",
}
_CHOICES = {  # the shape, colour and name of their marks, and how far off what drift says stands
    BY_DRIFT: ("*", ORANGE, "chosen by drift, without old data", (30, -42)),
    BLIND: ("X", _RED, "chosen by new accuracy alone", (14, 18)),
}
_LEGEND_COLUMNS = 2
_MOST = 103  # accuracy in % at the edge, so that marks at 100 are whole


def draw_demo(panels: Sequence[Any], result: DemoResult) -> None:
    """Draw each case into its axes, with its choices; one legend stands below them all.

    The axes are those of the pictures of studies: the old task to the right, the new one upwards.
    """
    for axes, (case, records) in zip(panels, result.records.items(), strict=True):
        _draw_fronts(axes, records)
        axes.axvline(result.before, color=_GREY, linestyle="--", linewidth=1)
        axes.set(title=f"{case[:1].upper()}{case[1:]}", xlabel="accuracy on the old task (%)")
        axes.grid(True, axis="both")
        axes.annotate(
            "before fine-tuning", (result.before - 1, 0.03), xycoords=("data", "axes fraction"),
            ha="right", fontsize=8, color=_GREY,
        )  # fmt: skip
        axes.annotate("better ↗", (0.02, 0.03), xycoords="axes fraction", fontsize=9)
        _draw_choices(axes, result.choices(case))
    panels[0].set_ylabel("accuracy on the new task (%)")
    panels[0].figure.suptitle(_TITLE, fontsize=12, weight="bold")
    # A run far below the probe has diverged: its point would press all others together.
    lowest = min(_start(records)[1] for records in result.records.values())
    for axes in panels:
        axes.set(xlim=(0, _MOST), ylim=(lowest - 5, _MOST))
    _draw_legend(panels)


def _draw_choices(axes: Any, chosen: Mapping[str, list[Record]]) -> None:
    """Draw where each rule's choices lie, the means over the seeds, and what drift says of them."""
    for rule, (shape, colour, name, (across, up)) in _CHOICES.items():
        place = _middle(chosen[rule])
        is_left = place[0] < _MOST / 2  # where words have room on the other side alone
        axes.scatter(*place, marker=shape, s=130, color=colour, zorder=4, label=name)
        axes.annotate(
            f"drift: kept {mean(map(_kept, chosen[rule])):.2f} (order only)", place, color=colour,
            fontsize=8, ha="left" if is_left else "right",
            xytext=(across if is_left else -across, up), textcoords="offset points",
            arrowprops={"arrowstyle": "-", "color": colour, "alpha": 0.5},
        )  # fmt: skip


def _draw_legend(panels: Sequence[Any]) -> None:
    """Draw what the marks of all axes mean, each once, where no point can lie below it."""
    marks = {
        name: mark
        for axes in panels
        for mark, name in zip(*axes.get_legend_handles_labels(), strict=True)
    }
    panels[0].figure.legend(
        marks.values(), marks, loc="outside lower center", ncols=_LEGEND_COLUMNS, fontsize=8
    )


def _draw_fronts(axes: Any, records: list[Record]) -> None:
    """Draw each method's path over its rates, from the linear probe on."""
    by_method = records_by(records, "method")
    start = _start(records)
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
                    f"{rate:g}", point, color=colour, fontsize=8, ha="right",
                    xytext=(-5, -11), textcoords="offset points",
                )  # fmt: skip
    axes.scatter(*start, marker="s", s=40, color="black", zorder=3)
    axes.axhline(start[1], color=_GREY, linestyle=":", linewidth=1)
    axes.annotate(
        "a new output layer alone (the square)", (0.02, start[1]),
        xycoords=("axes fraction", "data"), va="bottom", fontsize=8, color=_GREY,
    )  # fmt: skip


def _start(records: list[Record]) -> tuple[float, float]:
    return _middle(records_by(records, "method")[LINEAR_PROBE])


def _middle(runs: list[Record]) -> tuple[float, float]:
    across, up = zip(*map(_place, runs), strict=True)
    return mean(across), mean(up)


def _kept(run: Record) -> float:
    (drift,) = run["drift"].values()
    return Drift(**drift).kept


def _place(run: Record) -> tuple[float, float]:
    return old_of(run), new_of(run)
