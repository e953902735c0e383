"""A report on a data set's losses: a page and a picture, written into a folder."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from flowdata.report.html import render
from flowdata.report.pictures import plot_losses
from flowdata.weights import Temperature

if TYPE_CHECKING:
    from flowdata.scores import Scores


@dataclass(frozen=True)
class Report:
    """What `write_report` wrote.

    Attributes:
        page: path of the HTML page.
        picture: path of the PNG.
        summary: the figures, as `summarize` returns them.
    """

    page: Path
    picture: Path
    summary: dict[str, Any]


def write_report(
    scores: Scores,
    folder: str | Path,
    *,
    temperature: Temperature = "median",
    samples: Callable[[int], str] | None = None,
    top: int = 10,
) -> Report:
    """Write `report.html` and `losses.png` into a folder; return their paths and the figures.

    Args:
        scores: of N samples.
        folder: made if missing.
        temperature: as in `resolve_temperature`.
        samples: gives the text of sample i, of which the page shows the beginning; None shows
            numbers alone.
        top: how many of the easiest and of the hardest samples the page lists.

    Returns:
        The paths of the page and the picture, and the summary.

    Raises:
        ImportError: matplotlib is not installed.
        ValueError: no sample has a loss, `top` is negative, or the temperature is unusable.
    """
    if top < 0:
        raise ValueError(f"top must be >= 0, got {top}")
    summary = scores.summary(temperature)
    picture = plot_losses(scores.losses, Path(folder) / "losses.png", temperature=temperature)
    page = Path(folder) / "report.html"
    page.write_text(render(scores, summary, samples, top), encoding="utf-8")
    return Report(page, picture, summary)
