"""A study's picture: the trade-off between target and retained, over rates and temperatures."""

from __future__ import annotations

import math
from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any, TypeVar

from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png
from flowdata.study.extras import load_extra
from flowdata.study.methods import STANDARD, TEMPERATURES
from flowdata.study.records import Record
from flowdata.study.runs import Runs, chosen_runs, runs_by_rate, swept_runs

_Key = TypeVar("_Key")  # of runs: a method, a rate

# FLOW added to a method has FLOW's colour and that method's dashes.
CURVES: dict[str, tuple[str, str]] = {
    STANDARD: (BLUE, "-"),
    "FLOW": (GREEN, "-"),
    "l2": (ORANGE, "--"),
    "FLOW + l2": (GREEN, "--"),
    "WiSE-FT": (ORANGE, ":"),
    "FLOW + WiSE-FT": (GREEN, ":"),
}
_LINE = 10.0  # points from one label to the next
_BEFORE = "pre-trained"


def draw_picture(
    records: list[Record],
    *,
    variants: Collection[str] = tuple(TEMPERATURES),
    curves: Mapping[str, tuple[str, str]] = CURVES,
) -> bytes:
    """Draw a study and return the bytes of a PNG.

    The first panel shows the first retained measure over the first target measure, at each
    method's best rate. A second panel shows the same along the learning rate, if the records have
    standard fine-tuning at several rates. A third one shows both measures over the effective sample
    size (``effective_share`` in the records), if they have FLOW by several rules for the
    temperature.

    Args:
        records: what `run_study` returned.
        variants: methods that differ from another one by the setting of a dial. The first panel
            leaves them out; those called ``FLOW, RULE`` make the third.
        curves: the methods of the second panel, each with its colour and its line style.

    Raises:
        ImportError: matplotlib or scipy is not installed.
        ValueError: runs have no measure of the new task, or none of the old.
    """
    load_extra("matplotlib", "pictures")
    first = records[0]
    if not (first["target"] and first["retained"]):
        raise ValueError("a picture needs a measure in target and one in retained of each run")
    target, retained = next(iter(first["target"])), next(iter(first["retained"]))
    sweeps = {
        method: _finite(by_rate, target, retained)
        for method, by_rate in swept_runs(records).items()
    }
    rules = [
        _finite(_runs_by_rule(runs, variants), target, retained)
        for runs in runs_by_rate(records).values()
    ]
    runs_by_rule = max(rules, key=len, default={})
    draws: list[Callable[..., None]] = [
        partial(_draw_trade_off, runs=chosen_runs(records), variants=variants)
    ]
    if len(sweeps.get(STANDARD, {})) > 1:
        draws.append(partial(_draw_rates, sweeps=sweeps, curves=curves))
    shares = ("effective_share" in run for runs in runs_by_rule.values() for run in runs)
    if len(runs_by_rule) > 1 and all(shares):
        draws.append(partial(_draw_temperatures, runs=runs_by_rule))
    with figure(6 * len(draws), 5, panels=len(draws)) as (drawing, panels):
        for draw, axes in zip(draws, panels if len(draws) > 1 else [panels], strict=True):
            draw(axes, target=target, retained=retained)
        return png(drawing)


def _colour(method: str) -> str:
    if "FLOW" in method:
        return GREEN
    return BLUE if method == STANDARD else ORANGE


def _middle(runs: list[Record], target: str, retained: str) -> tuple[float, float]:
    return mean(r["target"][target] for r in runs), mean(r["retained"][retained] for r in runs)


def _finite(
    runs: Mapping[_Key, list[Record]], target: str, retained: str
) -> dict[_Key, list[Record]]:
    """The runs that have a place in the picture: those of which none diverged."""
    return {
        key: of_key
        for key, of_key in runs.items()
        if all(map(math.isfinite, _middle(of_key, target, retained)))
    }


def _draw_trade_off(
    axes: Any, runs: Runs, variants: Collection[str], target: str, retained: str
) -> None:
    places = {}
    chosen, runs = runs, _finite(runs, target, retained)
    diverged = [method for method in chosen if method not in {*runs, *variants}]
    losers = _worse_than_before(runs, target)
    omissions = {_BEFORE, *variants, *losers}
    for method in (m for m in runs if m not in omissions):
        places[method] = _middle(runs[method], target, retained)
        errors = [
            stdev(r[kind][name] for r in runs[method]) if len(runs[method]) > 1 else 0.0
            for kind, name in (("retained", retained), ("target", target))
        ]
        colour = _colour(method)
        axes.errorbar(*places[method], *errors, color=colour, elinewidth=1, alpha=0.4)
        axes.plot(*places[method], "o", color=colour, markersize=5)
    notes = [f"target {target}"]
    # The model before training is a line: as a point far off it would press all others together.
    if _BEFORE in runs:
        new, old = _middle(runs[_BEFORE], target, retained)
        axes.axhline(old, color="grey", linewidth=1, linestyle="--")
        notes[0] += f" (before training {new:.4g}, and the dashed line)"
    if losers:
        notes.append(f"worse than before training: {'; '.join(losers)}")
    if diverged:
        notes.append(f"diverged: {'; '.join(diverged)}")
    axes.set(title="At each method's best rate", xlabel="\n".join(notes), ylabel=retained)
    axes.grid(True, axis="both")
    axes.margins(x=0.1)
    _better_is_up_and_right(axes, target, retained)
    _label(axes, places)


def _worse_than_before(runs: Runs, target: str) -> list[str]:
    """The methods that made the target measure worse; their points would stretch the picture."""
    if _BEFORE not in runs:
        return []
    sign = 1 if target.endswith("accuracy") else -1
    gains = {
        name: sign * mean(r["target"][target] for r in records) for name, records in runs.items()
    }
    return [name for name in gains if gains[name] < gains[_BEFORE]]


def _label(axes: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points, with a line to each name that had to move away from others."""
    axes.autoscale_view()
    points_of_a_pixel = 72 / axes.figure.dpi
    height = {
        name: axes.transData.transform(place)[1] * points_of_a_pixel
        for name, place in places.items()
    }
    names = sorted(places, key=lambda name: height[name])
    label_heights = _apart([height[name] for name in names])
    for name, label_height in zip(names, label_heights, strict=True):
        shift = label_height - height[name]
        is_far = abs(shift) > _LINE / 2
        axes.annotate(
            name,
            places[name],
            (16 if is_far else 7, shift - 3),
            textcoords="offset points",
            fontsize=8,
            arrowprops={"arrowstyle": "-", "linewidth": 0.5, "color": "grey"} if is_far else None,
        )


def _apart(heights: Sequence[float]) -> list[float]:
    """The nearest heights, by least squares, that lie at least one line apart.

    Heights h₀, h₁, … lie at least a line apart exactly if h_i − i · line never falls. The nearest
    values that never fall are an isotonic regression.

    Args:
        heights: in rising order, in points.
    """
    optimize = load_extra("scipy.optimize", "pictures")
    steps = [_LINE * index for index in range(len(heights))]
    differences = [h - step for h, step in zip(heights, steps, strict=True)]
    rising = optimize.isotonic_regression(differences).x
    return [float(h) + step for h, step in zip(rising, steps, strict=True)]


def _draw_rates(
    axes: Any,
    sweeps: Mapping[str, Mapping[float, list[Record]]],
    curves: Mapping[str, tuple[str, str]],
    target: str,
    retained: str,
) -> None:
    for method, (colour, line) in curves.items():
        points = [_middle(runs, target, retained) for runs in sweeps.get(method, {}).values()]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", label=method)
        if method == STANDARD:
            names = [f"{rate:g}" for rate in sweeps[method]]
            _label(axes, dict(zip(names, points, strict=True)))
    axes.set(title="Over the learning rate", xlabel=f"target {target}", ylabel=retained)
    axes.legend(fontsize=8)
    axes.grid(True, axis="both")
    _better_is_up_and_right(axes, target, retained)


def _draw_temperatures(axes: Any, runs: Runs, target: str, retained: str) -> None:
    """Draw both measures over the effective sample size that each temperature rule gives."""
    points = [
        (
            mean(record["effective_share"] for record in records),
            *_middle(records, target, retained),
            rule,
        )
        for rule, records in runs.items()
    ]
    rate = next(iter(runs.values()))[0]["rate"]
    right_axes = axes.twinx()
    right_axes.grid(False)
    for share, x, y, _ in sorted(points):
        axes.plot(share, y, "o", color=GREEN)
        right_axes.plot(share, x, "s", color=BLUE, markersize=4)
    shares, xs, ys, _ = zip(*sorted(points), strict=True)
    axes.plot(shares, ys, color=GREEN, linewidth=1)
    right_axes.plot(shares, xs, color=BLUE, linewidth=1)
    _label(axes, {rule: (share, y) for share, _, y, rule in points})
    axes.set(title=f"Over the temperature (rate {rate:g})", xlabel="effective sample size / N")
    axes.set_ylabel(retained, color=GREEN)
    right_axes.set_ylabel(f"target {target}", color=BLUE)


def _runs_by_rule(runs: Runs, variants: Collection[str]) -> Runs:
    """FLOW's runs by their rule for the temperature, on the seeds that all rules share."""
    flow = {m: r for m, r in runs.items() if m == "FLOW" or (m in variants and "FLOW, " in m)}
    seeds = [{record["seed"] for record in records} for records in flow.values()]
    common_seeds = set.intersection(*seeds) if seeds else set()
    return {
        m.removeprefix("FLOW, ").replace("FLOW", "median"): [
            r for r in records if r["seed"] in common_seeds
        ]
        for m, records in flow.items()
        if common_seeds
    }


def _better_is_up_and_right(axes: Any, target: str, retained: str) -> None:
    axes.xaxis.set_inverted(not target.endswith("accuracy"))
    axes.yaxis.set_inverted(not retained.endswith("accuracy"))
