"""The page of a report: what a data set's losses look like, for a browser.

The page stands alone: it holds its styles and pictures, loads nothing from elsewhere and runs no
script. Every text in it is escaped.
"""

from __future__ import annotations

import base64
import json
import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import TYPE_CHECKING, Any

import torch

from flowdata.report.pictures import draw_losses, draw_weights, figure, png
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
# Control characters but tab and newline, and those that turn the direction of all text behind them:
# a sample that holds one could hide or rearrange what the page says.
_INVISIBLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\u202a-\u202e\u2066-\u2069]")
_EXCERPT = 600  # characters of a sample that are shown


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
        _tiles(summary),
        '<div class="pictures">',
        _picture("Distribution of losses", lambda axes: draw_losses(axes, losses, temperature)),
        _picture("Distribution of weights", lambda axes: draw_weights(axes, weights)),
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
        body += ["<h2>How the losses were made</h2>", _definitions(scores.metadata)]
    return _TEMPLATE.format(style=_STYLE, body="\n".join(body))


def _tiles(summary: Mapping[str, Any]) -> str:
    """The figures that stand at the top of the page, each in a tile."""
    rule, missing = summary["temperature_rule"], summary["missing"]
    tiles = [
        (f"{summary['samples']:,}", "samples" + (f", {missing:,} without a loss" * (missing > 0))),
        (_number(summary["loss"]["mean"]), "mean loss (nats)"),
        (
            _number(summary["temperature"]),
            "temperature" + ("" if rule == "given" else f" ({rule})"),
        ),
        (_number(summary["weight"]["mean"]), "mean weight"),
        (f"{summary['effective_sample_size']:,.0f}", "effective sample size"),
        (f"{summary['effective_share']:.0%}", "of the samples, effectively"),
    ]
    lines = (f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in tiles)
    return "\n".join(['<div class="tiles">', *lines, "</div>"])


def _picture(label: str, draw: Callable[[Any], None]) -> str:
    """A picture for a light and a dark page; the browser shows the one that fits."""
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
    losses = [summary["loss"][key] for key in _QUANTILE_NAMES]
    weights = weigh(torch.tensor(losses, dtype=torch.float64), summary["temperature"]).tolist()
    rows = (
        f"<tr><th>{name}</th><td>{_number(loss)}</td><td>{_number(weight)}</td></tr>"
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
    """What the scores' metadata say of the model, the data and the options, as a list."""
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
    text = _INVISIBLE.sub(lambda match: f"\\x{ord(match[0]):02x}", text)
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
