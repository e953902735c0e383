"""A report on a data set's losses: a page and a picture, written into a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from flowdata.report.html import render
from flowdata.report.pictures import draw_losses, draw_weights, figure, png
from flowdata.report.summary import present, summarize
from flowdata.scores import Scores
from flowdata.weights import Temperature, flow_weights, resolve_temperature


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Attributes:
        page: the HTML page.
        picture: the PNG.
        summary: the figures, as `summarize` returns them.
    """

    page: Path
    picture: Path
    summary: dict[str, Any]


def plot_scores(scores: Scores, path: str | Path, *, temperature: Temperature = "median") -> Path:
    """Draw the distributions of losses and weights into a PNG and return its path.

    Args:
        scores: samples without a loss are left out.
        path: of the PNG; missing folders are made.
        temperature: as in `resolve_temperature`.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no sample has a loss, or the temperature is unusable.
    """
    losses = present(scores)
    resolved = resolve_temperature(losses, temperature)
    with figure(10, 3.8, panels=2, width_ratios=[3, 2]) as (drawing, (left, right)):
        draw_losses(left, losses, resolved)
        draw_weights(right, flow_weights(losses, temperature=resolved))
        return _write(Path(path), png(drawing))


def write_report(
    scores: Scores,
    folder: str | Path,
    *,
    temperature: Temperature = "median",
    samples: Callable[[int], str] | None = None,
    top: int = 10,
) -> Report:
    """Write `report.html` and `losses.png` into a folder and return their paths.

    Args:
        scores: of N samples.
        folder: made if missing.
        temperature: as in `resolve_temperature`.
        samples: gives the text of sample i, of which the page shows the beginning; None shows
            numbers alone.
        top: how many of the easiest and of the hardest samples the page lists.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no sample has a loss, `top` is negative, or the temperature is unusable.
    """
    if top < 0:
        raise ValueError(f"top must be >= 0, got {top}")
    summary = summarize(scores, temperature)
    picture = plot_scores(scores, Path(folder) / "losses.png", temperature=temperature)
    page = render(scores, summary, samples, min(top, summary["samples"] - summary["missing"]))
    return Report(_write(Path(folder) / "report.html", page.encode()), picture, summary)


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path
