"""A study's picture: the trade-off between target and retained, over rates and temperatures."""

from __future__ import annotations

from collections.abc import Callable, Collection, Mapping, Sequence
from functools import partial
from statistics import mean, stdev
from typing import Any

from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png
from flowdata.study.extras import load_extra
from flowdata.study.methods import STANDARD, TEMPERATURES
from flowdata.study.runs import Record, Runs, chosen_runs, runs_by_rate, swept_runs

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

    One panel shows the first target measure against the first retained one, at each method's best
    rate. Where standard fine-tuning was run at several rates a second one shows the same over the
    learning rate, and where FLOW was run by several rules for the temperature a third one shows
    both over the effective sample size (``effective_share`` in the records).

    Args:
        records: what `run_study` returned.
        variants: methods that are another one with a dial turned. The first panel leaves them
            out; those called ``FLOW, RULE`` make the third.
        curves: the methods of the second panel, each with its colour and its line style.

    Raises:
        ImportError: matplotlib or scipy is not installed.
    """
    load_extra("matplotlib", "pictures")
    first = records[0]
    target, retained = next(iter(first["target"])), next(iter(first["retained"]))
    swept = swept_runs(records)
    rules = [_of_temperatures(runs, variants) for runs in runs_by_rate(records).values()]
    at_temperatures = max(rules, key=len, default={})
    draws: list[Callable[..., None]] = [
        partial(_draw_trade_off, runs=chosen_runs(records), variants=variants)
    ]
    if len(swept.get(STANDARD, {})) > 1:
        draws.append(partial(_draw_rates, swept=swept, curves=curves))
    shares = ("effective_share" in run for runs in at_temperatures.values() for run in runs)
    if len(at_temperatures) > 1 and all(shares):
        draws.append(partial(_draw_temperatures, runs=at_temperatures))
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


def _draw_trade_off(
    axes: Any, runs: Runs, variants: Collection[str], target: str, retained: str
) -> None:
    places = {}
    worse = _worse_than_before(runs, target)
    hidden = {_BEFORE, *variants, *worse}
    for method in (m for m in runs if m not in hidden):
        places[method] = _middle(runs[method], target, retained)
        errors = [
            stdev(r[kind][name] for r in runs[method]) if len(runs[method]) > 1 else 0.0
            for kind, name in (("retained", retained), ("target", target))
        ]
        colour = _colour(method)
        axes.errorbar(*places[method], *errors, color=colour, elinewidth=1, alpha=0.4)
        axes.plot(*places[method], "o", color=colour, markersize=5)
    notes = [f"target {target}"]
    if _BEFORE in runs:  # as a point it would press all others together
        new, old = _middle(runs[_BEFORE], target, retained)
        axes.axhline(old, color="grey", linewidth=1, linestyle="--")
        notes[0] += f" (before training {new:.4g}, and the dashed line)"
    if worse:
        notes.append(f"worse than before training: {'; '.join(worse)}")
    axes.set(title="At each method's best rate", xlabel="\n".join(notes), ylabel=retained)
    axes.grid(True, axis="both")
    axes.margins(x=0.1)
    _better_is_up_and_right(axes, target, retained)
    _label(axes, places)


def _worse_than_before(runs: Runs, target: str) -> list[str]:
    """The methods after which the target is worse than before: they would stretch the picture."""
    if _BEFORE not in runs:
        return []
    sign = 1 if target.endswith("accuracy") else -1
    gains = {
        name: sign * mean(r["target"][target] for r in records) for name, records in runs.items()
    }
    return [name for name in gains if gains[name] < gains[_BEFORE]]


def _label(axes: Any, places: Mapping[str, tuple[float, float]]) -> None:
    """Write names beside points; a line leads to a name that had to be moved off another one."""
    axes.autoscale_view()
    points = 72 / axes.figure.dpi  # in a pixel
    height = {name: axes.transData.transform(at)[1] * points for name, at in places.items()}
    names = sorted(places, key=lambda name: height[name])
    for name, free in zip(names, _apart([height[name] for name in names]), strict=True):
        shift = free - height[name]
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
    """Heights, rising, moved as little as possible to lie a line apart (least squares).

    Heights lie a line apart just where height − line · index still rises, so what is nearest to
    them under that condition is an isotonic regression.
    """
    optimize = load_extra("scipy.optimize", "pictures")
    steps = [_LINE * index for index in range(len(heights))]
    differences = [h - step for h, step in zip(heights, steps, strict=True)]
    rising = optimize.isotonic_regression(differences).x
    return [float(h) + step for h, step in zip(rising, steps, strict=True)]


def _draw_rates(
    axes: Any,
    swept: Mapping[str, Mapping[float, list[Record]]],
    curves: Mapping[str, tuple[str, str]],
    target: str,
    retained: str,
) -> None:
    for method, (colour, line) in curves.items():
        points = [_middle(runs, target, retained) for runs in swept.get(method, {}).values()]
        if points:
            axes.plot(*zip(*points, strict=True), line, color=colour, marker="o", label=method)
        if method == STANDARD:
            names = [f"{rate:g}" for rate in swept[method]]
            _label(axes, dict(zip(names, points, strict=True)))
    axes.set(title="Over the learning rate", xlabel=f"target {target}", ylabel=retained)
    axes.legend(fontsize=8)
    axes.grid(True, axis="both")
    _better_is_up_and_right(axes, target, retained)


def _draw_temperatures(axes: Any, runs: Runs, target: str, retained: str) -> None:
    """Both measures over the effective sample size that each temperature rule gives."""
    points = [
        (
            mean(record["effective_share"] for record in records),
            *_middle(records, target, retained),
            rule,
        )
        for rule, records in runs.items()
    ]
    rate = next(iter(runs.values()))[0]["rate"]
    other = axes.twinx()
    other.grid(False)
    for share, x, y, _ in sorted(points):
        axes.plot(share, y, "o", color=GREEN)
        other.plot(share, x, "s", color=BLUE, markersize=4)
    shares, xs, ys, _ = zip(*sorted(points), strict=True)
    axes.plot(shares, ys, color=GREEN, linewidth=1)
    other.plot(shares, xs, color=BLUE, linewidth=1)
    _label(axes, {rule: (share, y) for share, _, y, rule in points})
    axes.set(title=f"Over the temperature (rate {rate:g})", xlabel="effective sample size / N")
    axes.set_ylabel(retained, color=GREEN)
    other.set_ylabel(f"target {target}", color=BLUE)


def _of_temperatures(runs: Runs, variants: Collection[str]) -> Runs:
    """FLOW's runs by their rule for the temperature, on the seeds that all rules share."""
    flow = {m: r for m, r in runs.items() if m == "FLOW" or (m in variants and "FLOW, " in m)}
    seeds = [{record["seed"] for record in records} for records in flow.values()]
    shared = set.intersection(*seeds) if seeds else set()
    return {
        m.removeprefix("FLOW, ").replace("FLOW", "median"): [
            r for r in records if r["seed"] in shared
        ]
        for m, records in flow.items()
        if shared
    }


def _better_is_up_and_right(axes: Any, target: str, retained: str) -> None:
    axes.xaxis.set_inverted(not target.endswith("accuracy"))
    axes.yaxis.set_inverted(not retained.endswith("accuracy"))
