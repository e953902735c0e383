"""The demo's picture: the trade-off, and the losses of the new task."""

from __future__ import annotations

from statistics import mean
from typing import Any

from flowdata.cli.demo_result import FLOW, STANDARD, DemoResult
from flowdata.report.pictures import BLUE, GREEN, draw_losses


def draw_demo(left: Any, right: Any, result: DemoResult) -> None:
    """Draw the trade-off into one pair of axes, and the first seed's losses into the other."""
    _draw_trade_off(left, result)
    first = result.starts[0]
    draw_losses(right, first.losses, first.temperature)
    right.set_title("Losses of the new task (first seed)")


def _draw_trade_off(axes: Any, result: DemoResult) -> None:
    """Old against new accuracy: every run, and each method's path over the learning rates."""
    for method, colour in ((STANDARD, BLUE), (FLOW, GREEN)):
        middles = []
        for rate in result.rates:
            runs = result.runs(method, rate)
            is_best = rate == result.learning_rate(method)
            axes.scatter(
                [o.new for o in runs],
                [o.old for o in runs],
                s=26 if is_best else 12,
                color=colour,
                alpha=0.9 if is_best else 0.35,
                linewidths=0,
                label=f"{method}, rate {rate:g} (chosen)" if is_best else None,
            )
            middles.append((mean(o.new for o in runs), mean(o.old for o in runs)))
        axes.plot(*zip(*middles, strict=True), color=colour, linewidth=1, alpha=0.5)
        for rate, middle in zip(result.rates, middles, strict=True):
            axes.annotate(
                f"{rate:g}",
                middle,
                color=colour,
                fontsize=9,
                xytext=(5, 4),
                textcoords="offset points",
            )
    old, probe = mean(s.old for s in result.starts), mean(s.probe for s in result.starts)
    axes.scatter([probe], [old], marker="*", s=110, color="#9aa2b1", label="linear probe")
    axes.set(
        title="What was learned and what was kept",
        xlabel="accuracy on the new task (%)",
        ylabel="accuracy on the old task (%)",
        xlim=(probe - 5, 100),  # a run far below the probe has diverged and is left out
    )
    axes.grid(True, axis="both")
    axes.legend(loc="lower left", fontsize=9)
