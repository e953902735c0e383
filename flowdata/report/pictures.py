"""Pictures of losses and weights. Matplotlib is imported when the first is drawn."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from io import BytesIO
from pathlib import Path
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from flowdata.report.markdown import count
from flowdata.report.summary import NATS, drop_missing, in_unit
from flowdata.store.places import local_path
from flowdata.weights import Temperature, resolve_temperature, weigh

Theme = Literal["light", "dark"]

COLOURS: dict[str, dict[str, str]] = {
    "light": {"paper": "#ffffff", "ink": "#1f2430", "faint": "#d5d9e0", "muted": "#6b7280"},
    "dark": {"paper": "#14171f", "ink": "#e6e8ee", "faint": "#343a47", "muted": "#9aa2b1"},
}
BLUE, ORANGE, GREEN = "#3b82c4", "#e07b39", "#2f9e77"
IN_VIEW = 0.995  # the quantile where pictures end: what lies beyond is drawn at their edge
_MOST_POINTS = 5000


def load_matplotlib() -> tuple[Any, Any, Any]:
    """Return matplotlib's settings, canvas and figure; who draws at the end calls it first, too.

    Raises:
        ImportError: matplotlib is not installed.
    """
    try:
        from matplotlib import rc_context
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError:
        raise ImportError(
            'pictures need matplotlib: pip install "flowdata-torch[plotting]"'
        ) from None
    return rc_context, FigureCanvasAgg, Figure


@contextmanager
def figure(
    width: float, height: float, panels: int = 1, *, theme: Theme = "light", **options: Any
) -> Iterator[tuple[Any, Any]]:
    """Give a figure and its axes; matplotlib's global settings and backend stay as they are.

    Args:
        width: in inches.
        height: in inches.
        panels: axes side by side; of several, an array is given.
        theme: colours for a light or a dark page.
        options: for `Figure.subplots`.

    Raises:
        ImportError: matplotlib is not installed.
    """
    rc_context, canvas_of, figure_of = load_matplotlib()
    colours = COLOURS[theme]
    style = {
        "font.family": "sans-serif",
        "font.size": 10,
        "text.color": colours["ink"],
        "axes.labelcolor": colours["ink"],
        "axes.edgecolor": colours["faint"],
        "axes.facecolor": colours["paper"],
        "axes.spines.top": False,
        "axes.spines.right": False,
        "axes.titlesize": 11,
        "axes.titleweight": "bold",
        "axes.titlelocation": "left",
        "axes.axisbelow": True,
        "axes.grid": True,
        "axes.grid.axis": "y",
        "grid.color": colours["faint"],
        "grid.linewidth": 0.6,
        "xtick.color": colours["muted"],
        "ytick.color": colours["muted"],
        "figure.facecolor": colours["paper"],
        "legend.frameon": False,
    }
    # The style holds until the caller has drawn and saved. `Figure` is made without pyplot, which
    # would choose a backend for the whole program and keep the figure in memory.
    with rc_context(style):
        drawing = figure_of(figsize=(width, height), layout="constrained")
        canvas_of(drawing)
        yield drawing, drawing.subplots(1, panels, **options)


def plot_losses(
    losses: Tensor, path: str | Path, *, temperature: Temperature = "median", unit: str = NATS
) -> Path:
    """Draw the distributions of losses and weights into a PNG and return its path.

    Args:
        losses: (N,) floating; NaN for samples without a loss, which are left out.
        path: of the PNG; missing folders are made.
        temperature: as in `resolve_temperature`.
        unit: of the losses; "" for none.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no sample has a loss, or the temperature is unusable.
    """
    values = drop_missing(losses)
    temperature_value = resolve_temperature(values, temperature)
    with figure(10, 3.8, panels=2, width_ratios=[3, 2]) as (drawing, (left, right)):
        draw_losses(left, values, temperature_value, unit)
        draw_weights(right, weigh(values, temperature_value))
        content = png(drawing)
    path = local_path(path, "path")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def png(drawing: Any) -> bytes:
    """Return a figure as the bytes of a PNG."""
    out = BytesIO()
    drawing.savefig(out, format="png", dpi=160)
    return out.getvalue()


def draw_losses(axes: Any, losses: Tensor, temperature: float, unit: str = NATS) -> None:
    """Draw how the losses (N,) are distributed, with the temperature and the weight it gives."""
    values = losses.double().cpu().numpy()
    top = max(np.quantile(values, IN_VIEW), 1.5 * temperature)
    clipped = np.minimum(values, top)
    axes.hist(clipped, bins=bins(len(values), 0.0, top), color=BLUE, alpha=0.85)
    mark(axes, temperature, "temperature")
    name = in_unit("loss", unit)
    axes.set(title="Losses before fine-tuning", xlabel=name, ylabel="samples")
    axes.set_xlim(0, top)
    _count_samples(axes)
    if (num_larger := int((values > top).sum())) > 0:
        axes.set_xlabel(
            f"{name}; the last bar holds {count(num_larger, 'larger one')}, up to "
            f"{values.max():.3g}"
        )
    weight = axes.twinx()
    weight.grid(False)
    points = torch.linspace(0, top, 200, dtype=torch.float64)
    curve = weigh(points, temperature)
    weight.plot(points.numpy(), curve.numpy(), color=ORANGE, linewidth=1.8)
    weight.set(ylim=(0, 1.14), yticks=[0, 0.5, 1])
    weight.set_ylabel("weight", color=ORANGE)
    weight.tick_params(axis="y", colors=ORANGE)


def draw_weights(axes: Any, weights: Tensor) -> None:
    """Draw how the weights (N,) are distributed, with their mean."""
    values = weights.double().cpu().numpy()
    axes.hist(values, bins=bins(len(values), 0.0, max(1.0, values.max())), color=GREEN, alpha=0.85)
    mark(axes, values.mean(), "mean")
    axes.set(title="Weights", xlabel="weight", ylabel="samples")
    axes.set_xlim(0, max(1.0, values.max()))
    _count_samples(axes)


def draw_lengths(axes: Any, losses: Tensor, counts: Tensor, unit: str = NATS) -> None:
    """Draw the losses (N,) against the numbers of targets (N,), and the median over each length."""
    places, size = sample_points(len(losses))
    y, x = losses[places].double().numpy(), counts[places].clamp(min=1).double().numpy()
    top = max(float(np.quantile(y, IN_VIEW)), 1e-6) * 1.05
    axes.scatter(x, np.minimum(y, top), s=size, color=BLUE, alpha=0.4, linewidths=0)
    edges = np.unique(np.quantile(x, np.linspace(0, 1, 13)))
    groups = np.searchsorted(edges[1:-1], x, side="right")
    present = np.unique(groups)
    medians = [(np.median(x[groups == group]), np.median(y[groups == group])) for group in present]
    line = {"color": ORANGE, "linewidth": 1.8, "marker": "o", "markersize": 4}
    axes.plot(*zip(*medians, strict=True), label="median of samples about as long", **line)
    axes.legend(loc="best", fontsize=9)
    axes.xaxis.get_major_locator().set_params(integer=True, min_n_ticks=1)
    axes.set(
        title="Loss against length",
        xlabel="targets" + "; larger losses at the edge" * bool((y > top).any()),
        ylabel=in_unit("loss", unit),
        ylim=(min(0.0, float(y.min())), top),
    )
    if x.max() > 50 * x.min():
        axes.set_xscale("log")
        axes.xaxis.set_major_formatter("{x:,.0f}")


def _count_samples(axes: Any) -> None:
    """Let a histogram's axis of samples count them, and leave room for a mark's name."""
    axes.yaxis.get_major_locator().set_params(integer=True)
    axes.margins(y=0.14)


def mark(axes: Any, value: float, name: str, *, color: str = ORANGE) -> None:
    """Draw a vertical line at a value, with its name and size beside it at the top.

    Args:
        axes: to draw into.
        value: where.
        name: of the value.
        color: of the line and the name.
    """
    axes.axvline(value, color=color, linewidth=1.8, linestyle="--")
    axes.annotate(
        f"{name} {value:.3g}",
        (value, 1),
        xycoords=("data", "axes fraction"),
        xytext=(5, -4),
        textcoords="offset points",
        va="top",
        color=color,
    )


def sample_points(samples: int) -> tuple[Tensor, float]:
    """Return which of the samples a picture shows as points, evenly spread, and the points' size.

    Args:
        samples: how many there are.

    Returns:
        (n,) int64 places, all of them up to 5,000, and an area in square points.
    """
    count = min(samples, _MOST_POINTS)
    places = torch.arange(count) * (samples - 1) // max(1, count - 1)
    return places, float(np.clip(9000 / len(places), 6, 24))


def bins(samples: int, low: float, high: float) -> Any:
    """Return edges of 10 to 50 bars: by Rice's rule, twice the cube root of the samples.

    Args:
        samples: how many are drawn.
        low: the first edge.
        high: the last edge.
    """
    return np.linspace(low, high, int(np.clip(2 * samples ** (1 / 3), 10, 50)) + 1)
