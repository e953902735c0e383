"""What a data set's losses look like: summary numbers, a picture, and one page with both.

The page stands alone: styles and pictures are inside it, every text is escaped, nothing is
loaded from elsewhere and no script runs.
"""

from __future__ import annotations

import base64
import json
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from html import escape
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata.plots import draw_losses, draw_weights, figure, png
from flowdata.scores import Scores
from flowdata.weights import (
    Temperature,
    effective_sample_size,
    flow_weights,
    resolve_temperature,
)

QUANTILES = {
    "min": 0.0,
    "q10": 0.1,
    "q25": 0.25,
    "median": 0.5,
    "q75": 0.75,
    "q90": 0.9,
    "max": 1.0,
}
QUANTILE_NAMES = {
    "min": "easiest",
    "q10": "10 % are easier than",
    "q25": "25 %",
    "median": "half",
    "q75": "75 %",
    "q90": "90 %",
    "max": "hardest",
}
_EXCERPT = 600  # characters of a sample that are shown


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


def summarize(scores: Scores, temperature: Temperature = "median") -> dict[str, Any]:
    """Return the figures that describe losses and the weights made from them; JSON-like.

    Args:
        scores: of N samples; those without a loss are counted and left out of all else.
        temperature: as in `resolve_temperature`.

    Returns:
        `samples`, `missing` and `targets` (counts), `loss` (mean and quantiles, nats),
        `temperature` and the rule it came from, `weight` (mean, smallest, largest),
        `effective_sample_size` and `effective_share`, its share of the samples with a loss.

    Raises:
        ValueError: no sample has a loss, or the temperature is unusable.

    Example:
        >>> import torch
        >>> figures = summarize(Scores(torch.tensor([0.5, 1.0, 4.0, float("nan")])))
        >>> figures["missing"], figures["temperature"], round(figures["effective_share"], 3)
        (1, 1.0, 0.652)
    """
    losses = _present(scores)
    resolved = resolve_temperature(losses, temperature)
    weights = flow_weights(losses, temperature=resolved)
    effective = effective_sample_size(weights)
    values = np.quantile(losses.double().numpy(), list(QUANTILES.values()))
    return {
        "samples": len(scores),
        "missing": len(scores) - len(losses),
        "targets": int(scores.counts.sum()),
        "loss": {
            "mean": losses.mean(dtype=torch.float64).item(),
            **dict(zip(QUANTILES, values.tolist(), strict=True)),
        },
        "temperature": resolved,
        "temperature_rule": _rule_name(temperature),
        "weight": {
            "mean": weights.mean(dtype=torch.float64).item(),
            "min": weights.min().item(),
            "max": weights.max().item(),
        },
        "effective_sample_size": effective,
        "effective_share": effective / len(losses),
    }


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
    losses = _present(scores)
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
    page = _page(scores, summary, samples, min(top, summary["samples"] - summary["missing"]))
    return Report(_write(Path(folder) / "report.html", page.encode()), picture, summary)


def extremes(scores: Scores, top: int) -> tuple[list[int], list[int]]:
    """Return the indices of the `top` easiest and hardest samples, the most extreme first.

    Example:
        >>> import torch
        >>> extremes(Scores(torch.tensor([0.5, 3.0, float("nan"), 0.1])), top=2)
        ([3, 0], [1, 0])
    """
    present = (~scores.losses.isnan()).nonzero().flatten()
    losses = scores.losses[present]
    top = min(top, len(present))
    easy, hard = (losses.topk(top, largest=largest).indices for largest in (False, True))
    return present[easy].tolist(), present[hard].tolist()


def _present(scores: Scores) -> Tensor:
    losses = scores.losses[~scores.losses.isnan()]
    if len(losses) == 0:
        raise ValueError(
            f"none of the {len(scores)} samples has a loss: check that the labels are not all "
            "ignored and that the model's outputs are finite"
        )
    return losses


def _rule_name(temperature: Temperature) -> str:
    if callable(temperature):
        return getattr(temperature, "__name__", "callable")
    return temperature if isinstance(temperature, str) else "given"


def _write(path: Path, content: bytes) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_bytes(content)
    return path


def _page(
    scores: Scores,
    summary: Mapping[str, Any],
    samples: Callable[[int], str] | None,
    top: int,
) -> str:
    easy, hard = extremes(scores, top)
    losses, temperature = _present(scores), summary["temperature"]
    weights = flow_weights(losses, temperature=temperature)
    rule = summary["temperature_rule"]
    missing = summary["missing"]
    tiles = [
        (f"{summary['samples']:,}", "samples" + (f", {missing:,} without a loss" * (missing > 0))),
        (_number(summary["loss"]["mean"]), "mean loss (nats)"),
        (_number(temperature), "temperature" + ("" if rule == "given" else f" ({rule})")),
        (_number(summary["weight"]["mean"]), "mean weight"),
        (f"{summary['effective_sample_size']:,.0f}", "effective sample size"),
        (f"{summary['effective_share']:.0%}", "of the samples, effectively"),
    ]
    body = [
        '<div class="tiles">',
        *(f"<div><b>{escape(value)}</b>{escape(what)}</div>" for value, what in tiles),
        "</div>",
        '<div class="pictures">',
        _picture("Distribution of losses", lambda axes: draw_losses(axes, losses, temperature)),
        _picture("Distribution of weights", lambda axes: draw_weights(axes, weights)),
        "</div>",
        "<h2>From easy to hard</h2>",
        _quantile_table(summary),
    ]
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
        body += ["<h2>How the losses were made</h2>", _definitions(scores.metadata)]
    return _TEMPLATE.format(style=_STYLE, body="\n".join(body))


def _picture(label: str, draw: Callable[[Any], None]) -> str:
    """Both themes of a picture; the browser takes the one that fits."""
    sources = {}
    for theme in ("light", "dark"):
        with figure(6.4, 3.8, theme=theme) as (drawing, axes):
            draw(axes)
            sources[theme] = "data:image/png;base64," + base64.b64encode(png(drawing)).decode()
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{escape(label)}"></picture>'
    )


def _quantile_table(summary: Mapping[str, Any]) -> str:
    temperature = summary["temperature"]
    rows = (
        f"<tr><th>{name}</th><td>{_number(summary['loss'][key])}</td>"
        f"<td>{_number(math.exp(-summary['loss'][key] / temperature))}</td></tr>"
        for key, name in QUANTILE_NAMES.items()
    )
    return f"<table><tr><th></th><td>loss</td><td>weight</td></tr>{''.join(rows)}</table>"


def _samples(
    scores: Scores,
    indices: Sequence[int],
    temperature: float,
    samples: Callable[[int], str] | None,
) -> str:
    items = []
    for index in indices:
        loss = scores.losses[index].item()
        weight = math.exp(-loss / temperature)
        targets = int(scores.counts[index])
        facts = f"<span>loss <b>{_number(loss)}</b></span>"
        facts += f"<span>weight <b>{_number(weight)}</b></span>"
        if targets != 1:
            facts += f"<span>targets <b>{targets:,}</b></span>"
        text = "" if samples is None else f"<pre>{escape(_excerpt(samples(index)))}</pre>"
        items.append(
            f'<li><div class="facts"><b>#{index}</b>{facts}'
            f'<i style="--weight:{weight:.4f}"></i></div>{text}</li>'
        )
    return f'<ol class="samples">{"".join(items)}</ol>'


def _definitions(metadata: Mapping[str, Any]) -> str:
    facts = {
        name: value
        for part in ("identity", "details")
        for name, value in dict(metadata.get(part) or {}).items()
        if value is not None
    }
    rows = (
        f"<dt>{escape(str(name))}</dt>"
        f"<dd>{escape(value if isinstance(value, str) else json.dumps(value, default=str))}</dd>"
        for name, value in facts.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def _excerpt(text: str) -> str:
    more = len(text) - _EXCERPT
    return text if more <= 0 else f"{text[:_EXCERPT].rstrip()} … ({more:,} more characters)"


def _number(value: float) -> str:
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2430; --muted: #6b7280;
  --faint: #e5e8ee; --card: #f6f7f9; --accent: #2f9e77; }
@media (prefers-color-scheme: dark) { :root { --paper: #14171f; --ink: #e6e8ee;
  --muted: #9aa2b1; --faint: #2b303c; --card: #1c202a; } }
* { box-sizing: border-box; }
body { margin: 0 auto; padding: 1.5rem 1rem 4rem; max-width: 68rem; background: var(--paper);
  color: var(--ink); font: 1rem/1.5 system-ui, sans-serif; }
h1 { margin: 0 0 1rem; font-size: 1.5rem; } h2 { margin: 2.2rem 0 .3rem; font-size: 1.15rem; }
p { margin: 0 0 .8rem; color: var(--muted); }
.tiles { display: grid; grid-template-columns: repeat(auto-fit, minmax(9rem, 1fr)); gap: .6rem; }
.tiles div { padding: .7rem .9rem; border-radius: .6rem; background: var(--card);
  color: var(--muted); font-size: .85rem; }
.tiles b { display: block; color: var(--ink); font-size: 1.5rem; line-height: 1.3; }
.pictures { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(22rem, 100%), 1fr));
  gap: 1rem; margin-top: 1.5rem; }
.pictures img { display: block; width: 100%; }
table { width: 100%; max-width: 32rem; border-collapse: collapse;
  font-variant-numeric: tabular-nums; }
th, td { padding: .4rem .6rem; border-bottom: 1px solid var(--faint); text-align: right;
  white-space: nowrap; }
th { color: var(--muted); font-weight: normal; text-align: left; }
.samples { margin: 0; padding: 0; list-style: none; }
.samples li { padding: .7rem 0; border-bottom: 1px solid var(--faint); }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; align-items: center;
  color: var(--muted); font-size: .9rem; font-variant-numeric: tabular-nums; }
.facts b { color: var(--ink); }
.facts > b { min-width: 4rem; }
.facts i { flex: 0 0 6rem; height: .45rem; margin-left: auto; border-radius: 1rem;
  background: linear-gradient(var(--accent) 0 0) 0 / calc(100% * var(--weight)) no-repeat
  var(--faint); }
pre { margin: .5rem 0 0; padding: .6rem .8rem; border-radius: .5rem; background: var(--card);
  font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<title>flowdata: losses and weights</title>
<style>{style}</style>
</head>
<body>
<h1>Losses and weights</h1>
{body}
</body>
</html>
"""
