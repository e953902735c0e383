"""The page of a report: what a data set's losses look like, for a browser."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import torch

from flowdata.report.page import (
    definitions,
    number,
    page,
    picture,
    sample_item,
    sample_list,
    tiles,
)
from flowdata.report.pictures import draw_losses, draw_weights
from flowdata.report.summary import drop_missing, extremes
from flowdata.weights import weigh

if TYPE_CHECKING:
    from flowdata.scores import Scores

_QUANTILE_NAMES = {
    "min": "easiest",
    "q10": "10 % are easier than",
    "q25": "25 %",
    "median": "half",
    "q75": "75 %",
    "q90": "90 %",
    "max": "hardest",
}


def render(
    scores: Scores,
    summary: Mapping[str, Any],
    samples: Callable[[int], str] | None,
    top: int,
) -> str:
    """Return the HTML page.

    Args:
        scores: of N samples.
        summary: as `summarize` returns it.
        samples: gives the text of sample i; None shows numbers alone.
        top: how many of the easiest and of the hardest samples to list.
    """
    losses, temperature = drop_missing(scores.losses), summary["temperature"]
    weights = weigh(losses, temperature)
    body = [
        tiles(_figures(summary)),
        '<div class="pictures">',
        picture("Distribution of losses", lambda axes: draw_losses(axes, losses, temperature)),
        picture("Distribution of weights", lambda axes: draw_weights(axes, weights)),
        "</div>",
        "<h2>From easy to hard</h2>",
        _quantile_table(summary),
    ]
    easy, hard = extremes(scores.losses, top)
    for title, note, indices in (
        ("Easiest samples", "What the model already does; they keep most of their weight.", easy),
        ("Hardest samples", "They keep least. Look for noise, or for what is new.", hard),
    ):
        if indices:
            body += [
                f"<h2>{title}</h2><p>{note}</p>",
                _samples(scores, indices, temperature, samples),
            ]
    if scores.metadata:
        body += ["<h2>How the losses were made</h2>", definitions(scores.metadata)]
    return page("Losses and weights", body)


def _figures(summary: Mapping[str, Any]) -> list[tuple[str, str]]:
    rule, missing = summary["temperature_rule"], summary["missing"]
    return [
        (f"{summary['samples']:,}", "samples" + (f", {missing:,} without a loss" * (missing > 0))),
        (number(summary["loss"]["mean"]), "mean loss (nats)"),
        (
            number(summary["temperature"]),
            "temperature" + ("" if rule == "given" else f" ({rule})"),
        ),
        (number(summary["weight"]["mean"]), "mean weight"),
        (f"{summary['effective_sample_size']:,.0f}", "effective sample size"),
        (f"{summary['effective_share']:.0%}", "of the samples, effectively"),
    ]


def _quantile_table(summary: Mapping[str, Any]) -> str:
    losses = [summary["loss"][key] for key in _QUANTILE_NAMES]
    weights = weigh(torch.tensor(losses, dtype=torch.float64), summary["temperature"]).tolist()
    rows = (
        f"<tr><th>{name}</th><td>{number(loss)}</td><td>{number(weight)}</td></tr>"
        for name, loss, weight in zip(_QUANTILE_NAMES.values(), losses, weights, strict=True)
    )
    return f"<table><tr><th></th><td>loss</td><td>weight</td></tr>{''.join(rows)}</table>"


def _samples(
    scores: Scores,
    indices: Sequence[int],
    temperature: float,
    samples: Callable[[int], str] | None,
) -> str:
    """A list of samples with their losses and weights; a bar shows each weight's size."""
    items = []
    losses = scores.losses[indices]
    weights = weigh(losses, temperature).tolist()
    for index, loss, weight in zip(indices, losses.tolist(), weights, strict=True):
        targets = int(scores.counts[index])
        facts = {"loss": number(loss), "weight": number(weight)}
        if targets != 1:
            facts["targets"] = f"{targets:,}"
        items.append(sample_item(index, facts, weight, samples))
    return sample_list(items)
