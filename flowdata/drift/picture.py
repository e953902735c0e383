"""The front: what runs learned against what they forgot, and which of them was chosen."""

from __future__ import annotations

import math
from collections.abc import Sequence

from flowdata.drift.choosing import Candidate
from flowdata.report.pictures import BLUE, ORANGE, figure, png

_MEASURES = {
    "kl": "drift: KL(base ‖ tuned), nats a target (less is better)",
    "kept": "share of the old accuracy kept, by the drift (more is better)",
}
_SCORES = {
    "loss": "validation loss, nats a target (less is better)",
    "accuracy": "validation accuracy (more is better)",
}


def draw_front(candidates: Sequence[Candidate], *, measure: str = "kl") -> bytes:
    """Return a picture of runs as PNG: validation against drift, the chosen one marked.

    Runs on the front are joined; runs that diverged are left out.

    Args:
        candidates: as `rank` returns them, the best first.
        measure: of the drift, along the horizontal axis: ``"kl"``, or ``"kept"``, which is what
            accuracies were weighed against.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `candidates` are runs that were not ranked.
        ValueError: an unknown measure, or no run with finite figures.
    """
    if measure not in _MEASURES:
        raise ValueError(f"measure must be 'kl' or 'kept', got {measure!r}")
    for candidate in candidates:
        if not isinstance(candidate, Candidate):
            raise TypeError(
                f"candidates must be what rank(runs) returns, got {type(candidate).__name__}"
            )
    finite = [c for c in candidates if math.isfinite(c.cost)]
    if not finite:
        raise ValueError("no candidate has finite figures: there is nothing to draw")
    best = finite[0]
    with figure(6.4, 4.2) as (drawing, axes):
        places = {c.name: (getattr(c.drift, measure), c.validation) for c in finite}
        front = sorted(places[c.name] for c in finite if c.is_on_front)
        axes.plot(*zip(*front, strict=True), color=BLUE, linewidth=1.2, alpha=0.6)
        for candidate in finite:
            is_best = candidate is best
            axes.scatter(
                *places[candidate.name],
                s=70 if is_best else 24,
                color=ORANGE if is_best else BLUE,
                alpha=1.0 if candidate.is_on_front or is_best else 0.35,
                linewidths=0,
                zorder=3 if is_best else 2,
                label=f"chosen: {best.name}" if is_best else None,
            )
            axes.annotate(
                candidate.name,
                places[candidate.name],
                fontsize=9,
                xytext=(6, 5),
                textcoords="offset points",
            )
        axes.set(
            title="What was learned and what was forgotten",
            xlabel=_MEASURES[measure],
            ylabel=_SCORES[best.kind],
        )
        axes.grid(True, axis="both")
        axes.margins(x=0.14, y=0.08)  # room for the names
        axes.legend(loc="best", fontsize=9)
        return png(drawing)
