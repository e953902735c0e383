"""The theory of FLOW in the linear setting, drawn.

    python -m benchmarks forgetting theory

The first panel holds the closed forms against gradient descent: along e, the way from the old model
to the new task's own, FLOW hardly moves. The others show how methods trade the old task for the
new, each over all settings of its dials. Where the new data's covariance is I, every method moves
along e alone, so all of them lie on one curve, standard descent that is stopped early among them:
FLOW's temperature is one more dial on that curve. Where the new data are correlated the curves
part, and which method is ahead depends on the old data, which nobody has who fine-tunes.
"""

from __future__ import annotations

import math
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from benchmarks.forgetting import theory
from flowdata import flow_weights
from flowdata.report.pictures import BLUE, GREEN, ORANGE, figure, png

APART = torch.tensor([1.0, 0.0], dtype=torch.float64)  # e = ē
ACROSS = torch.tensor([0.0, 1.0], dtype=torch.float64)  # ē⊥
RHO = 0.5
OLD_ACROSS, OLD_ALONG = (
    torch.eye(2, dtype=torch.float64) + 2 * torch.outer(axis, axis) for axis in (ACROSS, APART)
)  # the old data's covariance, large across e or along it
_PLACES = np.arange(101) / 100  # of the new error
_GREY = "#9aa2b1"
_NEW = {"xlabel": "error on the new data (before fine-tuning: 1)", "xlim": (-0.02, 1.02)}
_STYLES: dict[str, tuple[str, float, str]] = {  # line, width, colour: wide ones below narrow ones
    theory.STANDARD: ("-", 4.5, "#c9ced8"),
    theory.AVERAGING: (":", 2.2, ORANGE),
    theory.L2: ("--", 1.6, BLUE),
    theory.FLOW: ("-", 1.6, GREEN),
    theory.BOUND: ("-", 0.8, "#1f2430"),
}


def draw(output: Path, samples: int = 50_000) -> Path:
    """Draw the picture into a PNG and return its path.

    Args:
        output: the PNG's path; missing folders are made.
        samples: number of samples that gradient descent runs on.
    """
    with figure(17, 4.6, panels=4) as (drawing, (stalling, curve, ahead, level)):
        _draw_stalling(stalling, samples)
        _draw_curve(curve)
        _draw_excess(ahead, OLD_ACROSS)
        ahead.set_title(
            "Correlated; the old task suffers most\noff the straight way: FLOW is ahead"
        )
        _draw_excess(level, OLD_ALONG)
        level.set_title("Correlated; it suffers most along the\nstraight way: FLOW near standard")
        output.parent.mkdir(parents=True, exist_ok=True)
        output.write_bytes(png(drawing))
    return output


def _draw_stalling(axes: Any, samples: int) -> None:
    """Draw what is left of e over the steps: predicted as lines, by gradient descent as dots."""
    steps, rate = torch.arange(61), 0.05
    covariance = theory.correlated_covariance(APART, ACROSS, RHO)
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(samples, len(APART), generator=generator, dtype=APART.dtype)
    x = x @ torch.linalg.cholesky(covariance).T
    losses = (x @ APART).square()
    for temperature, colour, name in (
        (math.inf, _GREY, "standard (temperature ∞)"),
        (4.0, BLUE, "FLOW, temperature 4"),
        (theory.MEDIAN, GREEN, "FLOW, the losses' median (default)"),
        (0.1, ORANGE, "FLOW, temperature 0.1"),
    ):
        weights = torch.ones_like(losses)
        if math.isfinite(temperature):
            weights = flow_weights(losses, temperature=temperature)
        matrix = theory.weighted_covariance(covariance, APART, temperature)
        line = theory.descent_position(matrix, APART, rate, steps) @ APART
        dots = theory.descent_path(x, APART, weights, rate, len(steps) - 1) @ APART
        axes.plot(line, color=colour, label=name)
        axes.plot(steps[::6], dots[::6], "o", color=colour, markersize=4)
    axes.set(
        title="FLOW stalls on the straight way to the new\ntask (lines: formula, dots: trained)"
    )
    axes.set(xlabel="step", ylabel="share of the way still to go", ylim=(0, 1.03))
    axes.legend(fontsize=8)


def _draw_curve(axes: Any) -> None:
    """Draw old error over new of every method, for new data without correlation."""
    trade_offs = theory.trade_offs(APART, ACROSS, 0.0, OLD_ACROSS)
    for name, (style, width, colour) in _STYLES.items():
        axes.plot(*_front(trade_offs[name]).T, style, linewidth=width, color=colour, label=name)
    axes.set(title="Uncorrelated new data:\nall methods lie on one curve", **_NEW)
    axes.set(ylabel="error on the old data (before: 0)")
    axes.annotate("better ↙", (0.03, 0.03), xycoords="axes fraction", fontsize=9)
    axes.grid(True, axis="both")
    axes.legend(fontsize=8)


def _draw_excess(axes: Any, old: Tensor) -> None:
    """Draw by how much each method's old error is above the least possible, over the new error."""
    trade_offs = theory.trade_offs(APART, ACROSS, RHO, old)
    bound = _front(trade_offs[theory.BOUND]).numpy()
    for name, (style, width, colour) in _STYLES.items():
        new, error = trade_offs[name].numpy().T
        excess = np.full(len(_PLACES), np.nan)  # the least near each place; dials are set in steps
        np.fmin.at(excess, np.rint(100 * new).astype(int), error - np.interp(new, *bound.T))
        shown = np.isfinite(excess)
        axes.plot(_PLACES[shown], excess[shown], style, linewidth=width, color=colour, label=name)
    axes.set(ylabel="error on the old data above the least possible", **_NEW)
    axes.annotate("better ↓", (0.97, 0.6), xycoords="axes fraction", fontsize=9, ha="right")
    axes.grid(True, axis="both")
    axes.legend(fontsize=8)


def _front(points: Tensor) -> Tensor:
    """The points, (P, 2), that no other beats in both, by their first number."""
    points = points[points[:, 0].argsort()]
    least = points[:, 1].cummin(dim=0).values
    return points[points[:, 1] <= least]
