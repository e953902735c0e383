"""A page for a browser: how it looks, and the parts that every page of a report is made of.

A page stands alone: it holds its styles, pictures, data and script, and forbids the browser to load
anything else. Every text in it is escaped.
"""

from __future__ import annotations

import base64
import json
from collections.abc import Callable, Mapping, Sequence
from html import escape
from typing import Any

from flowdata._common.excerpts import FROM_0
from flowdata.report.pictures import figure, png
from flowdata.report.samples import Piece, SampleText, shorten, spelt_out

_ROUNDING = 1e-9  # of a share
_EXCERPT = 600  # characters of a sample in a list that are shown


def page(title: str, body: Sequence[str]) -> str:
    """Return an HTML page.

    Args:
        title: its first heading.
        body: its parts, HTML.
    """
    heading = escape(spelt_out(title))
    return _TEMPLATE.format(style=_STYLE, title=heading, body="\n".join(body))


def tiles(figures: Sequence[tuple[str, str]]) -> str:
    """Return the figures that stand at the top of a page, each in a tile.

    Args:
        figures: value and name of each.
    """
    lines = (f"<div><b>{escape(value)}</b>{escape(name)}</div>" for value, name in figures)
    return "\n".join(['<div class="tiles">', *lines, "</div>"])


def sample_item(
    index: int,
    facts: Mapping[str, str],
    bar: float,
    text: SampleText | None,
    *,
    image: str | None = None,
    colour: str = "accent",
) -> str:
    """Return a sample as an item of a list: its number, facts, a bar, its image and its text.

    Args:
        index: the sample.
        facts: values by their names.
        bar: its length, a share.
        text: the sample's; None shows none.
        image: the address of its thumbnail; None shows none.
        colour: of the bar: ``"accent"`` or ``"warn"``.
    """
    spans = "".join(f"<span>{escape(k)} <b>{escape(v)}</b></span>" for k, v in facts.items())
    thumbnail = f'<img class="thumbnail" src="{image}" alt="sample {index}">' if image else ""
    excerpt = "" if text is None else _text(shorten(text, _EXCERPT))
    return (
        f'<li><div class="facts"><b>#{index}</b>{spans}'
        f'<i class="{colour}" style="--weight:{bar:.4f}"></i></div>{thumbnail}{excerpt}</li>'
    )


def sample_list(items: Sequence[str]) -> str:
    """Return items as a list, below a line on how they are numbered."""
    return f'<p>{FROM_0.capitalize()}.</p><ol class="samples">{"".join(items)}</ol>'


def picture(label: str, draw: Callable[[Any], None]) -> str:
    """Return a picture for a light and a dark page; the browser shows the one that fits.

    Args:
        label: what it shows, for who can't see it.
        draw: draws into axes.
    """
    sources = {}
    for theme in ("light", "dark"):
        with figure(6.4, 3.8, theme=theme) as (drawing, axes):
            draw(axes)
            sources[theme] = "data:image/png;base64," + base64.b64encode(png(drawing)).decode()
    return (
        f'<picture><source media="(prefers-color-scheme: dark)" srcset="{sources["dark"]}">'
        f'<img src="{sources["light"]}" alt="{escape(label)}"></picture>'
    )


def definitions(metadata: Mapping[str, Any]) -> str:
    """Return what scores' metadata say of the model, the data and the options, as a list.

    Of what is long, such as a chat template, the beginning will do.
    """
    facts = {
        name: value
        for part in ("identity", "details")
        for name, value in dict(metadata.get(part) or {}).items()
        if value is not None
    }
    texts = {
        name: value if isinstance(value, str) else json.dumps(value, default=str)
        for name, value in facts.items()
    }
    rows = (
        f"<dt>{escape(spelt_out(str(name)))}</dt><dd>{escape(shorten(text, _EXCERPT)[0].text)}</dd>"
        for name, text in texts.items()
    )
    return f"<dl>{''.join(rows)}</dl>"


def number(value: float) -> str:
    """Return a number as it stands on a page."""
    return f"{value:.3g}" if abs(value) < 1000 else f"{value:,.0f}"


def percent(share: float) -> str:
    """Return a share in %; one that would round to none or all, and is not, as less or more.

    Example:
        >>> percent(0.0), percent(0.0025), percent(0.25), percent(0.9975), percent(1.0)
        ('0%', '< 1%', '25%', '> 99%', '100%')
    """
    text = f"{share:.0%}"
    if text == "0%" and share > 0:
        return "< 1%"
    return "> 99%" if text == "100%" and share < 1 - _ROUNDING else text


def _text(pieces: Sequence[Piece]) -> str:
    """A sample's text; each piece of a chat stands by itself, with who says it."""
    spans = (
        f'<span class="{"target" if piece.is_target else "prompt"}" '
        f'data-role="{escape(piece.role)}">{escape(piece.text)}</span>'
        if piece.role or piece.is_target
        else escape(piece.text)
        for piece in pieces
    )
    return f"<pre>{''.join(spans)}</pre>"


_STYLE = """
:root { color-scheme: light dark; --paper: #fff; --ink: #1f2430; --muted: #6b7280;
  --faint: #e5e8ee; --card: #f6f7f9; --accent: #2f9e77; --warn: #e07b39; }
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
.thumbnail { display: block; min-width: 4rem; max-width: 100%; margin-top: .5rem;
  border-radius: .3rem; image-rendering: pixelated; }
.facts { display: flex; flex-wrap: wrap; gap: .1rem 1.2rem; align-items: center;
  color: var(--muted); font-size: .9rem; font-variant-numeric: tabular-nums; }
.facts b { color: var(--ink); }
.facts > b { min-width: 4rem; }
.facts i { flex: 0 0 6rem; height: .45rem; margin-left: auto; border-radius: 1rem;
  background: linear-gradient(var(--bar) 0 0) 0 / calc(100% * var(--weight)) no-repeat
  var(--faint); }
.accent { --bar: var(--accent); } .warn { --bar: var(--warn); }
pre { margin: .5rem 0 0; padding: .6rem .8rem; border-radius: .5rem; background: var(--card);
  font: .85rem/1.45 ui-monospace, monospace; white-space: pre-wrap; overflow-wrap: anywhere; }
pre span { display: block; padding: .15rem .6rem; border-left: .25rem solid var(--faint);
  unicode-bidi: plaintext; text-align: start; }
pre span + span { margin-top: .4rem; }
pre span.target { border-color: var(--accent); }
pre span::before { content: attr(data-role); display: block; color: var(--muted);
  font-size: .75rem; }
pre span.target::before { content: attr(data-role) " · target"; color: var(--accent); }
.verdict { margin-bottom: 1.5rem; padding: .9rem 1.1rem; border-left: .3rem solid var(--accent);
  border-radius: .3rem .6rem .6rem .3rem; background: var(--card); }
.verdict b { display: block; margin-bottom: .3rem; font-size: 1.15rem; line-height: 1.35; }
.verdict p:last-child { margin: 0; }
.verdict summary { cursor: pointer; color: var(--accent); }
.verdict ul { margin: .5rem 0 0; padding-left: 1.2rem; }
dl { display: grid; grid-template-columns: max-content 1fr; gap: .25rem 1rem; font-size: .9rem; }
dt { color: var(--muted); } dd { margin: 0; overflow-wrap: anywhere; }
"""

_TEMPLATE = """<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width, initial-scale=1">
<meta http-equiv="Content-Security-Policy" content="default-src 'none'; img-src data:;
 style-src 'unsafe-inline'; script-src 'unsafe-inline'">
<title>flowdata: {title}</title>
<style>{style}</style>
</head>
<body>
<h1>{title}</h1>
{body}
</body>
</html>
"""
