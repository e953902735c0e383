"""The page of a report: what a data set's losses look like, for a browser."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from html import escape
from pathlib import PurePath
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from flowdata.report.oddities import Oddities, length_remark, meaning_of, reasons_in
from flowdata.report.page import (
    definitions,
    number,
    page,
    percent,
    picture,
    sample_item,
    sample_list,
    tiles,
)
from flowdata.report.pictures import draw_lengths, draw_losses, draw_weights
from flowdata.report.rule import FIGURES
from flowdata.report.samples import SampleText, spelt_out
from flowdata.report.summary import FEWEST, drop_missing, extremes, in_unit, unit_of
from flowdata.report.table import Column, Tokens, table
from flowdata.report.thumbnails import thumbnails
from flowdata.report.verdict import Verdict, origin_of, temperatures
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
    texts: Sequence[SampleText] | None,
    top: int,
    *,
    oddities: Oddities,
    verdict: Verdict,
    words: Callable[[int], Sequence[str]] | None = None,
    images: Callable[[int], Any] | None = None,
) -> str:
    """Return the HTML page.

    Args:
        scores: of N samples.
        summary: as `summarize` returns it.
        texts: of all samples; None shows numbers alone.
        top: how many of the easiest and of the hardest samples to list.
        oddities: as `find_oddities` returns them.
        verdict: as `judge` returns it.
        words: gives the texts of sample i's targets, for scores that hold token losses.
        images: gives the image of sample i, as `thumbnail` takes it.
    """
    losses, temperature = drop_missing(scores.losses), summary["temperature"]
    easy, hard = extremes(scores.losses, top)
    order = [*easy, *_hardest_first(scores).tolist()]
    addresses = None if images is None else thumbnails(images, order)
    body = [
        _verdict(verdict),
        tiles(_figures(summary, unit_of(scores.metadata))),
        *_pictures(scores, losses, temperature),
        "<h2>What is odd</h2>",
        _odd(oddities, scores),
        '<h2 id="samples">All samples</h2>',
        _table(scores, losses, summary, texts, oddities, words, addresses),
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
                _samples(scores, indices, temperature, texts, addresses or {}),
            ]
    if scores.metadata:
        body += ["<h2>How the losses were made</h2>", definitions(scores.metadata)]
    return page(_title(scores.metadata), body)


def _title(metadata: Mapping[str, Any]) -> str:
    """What the page is about, with the names of data and model, as far as they are known."""
    details = metadata.get("details") or {}
    data, model = details.get("data"), details.get("model")
    data = data.get("source") if isinstance(data, Mapping) else data
    if data is None:  # `dataset_id` is a name, and a fingerprint is none
        identity = str((metadata.get("identity") or {}).get("dataset", ""))
        data = None if re.match(r"(content|tokens):|part |$", identity) else identity
    parts = [
        f" {word} {_short_name(name)}"
        for word, name in (("of", data), ("under", model))
        if isinstance(name, str) and name
    ]
    return "Losses" + "".join(parts) if parts else "Losses and weights"


def _short_name(name: str) -> str:
    """A path's last part; another name as it is."""
    is_path = name.startswith((".", "/", "~")) or "\\" in name
    return PurePath(name).name or name if is_path else name


def _verdict(verdict: Verdict) -> str:
    text = "".join(f"<p>{_with_code(part)}</p>" for part in verdict.text)
    if verdict.code:
        text += f"<p><code>{escape(verdict.code)}</code></p>"
    figures = "".join(
        f"<li>{_with_code(clause.advice)} {escape(clause.figure)}</li>"
        for clause in verdict.clauses
    )
    if figures:
        text += f"<details><summary>{escape(FIGURES)}</summary><ul>{figures}</ul></details>"
    return f'<div class="verdict"><b>{escape(verdict.title)}</b>{text}</div>'


def _with_code(text: str) -> str:
    """A text as HTML, with what stands between backticks as code."""
    return re.sub("`([^`]+)`", r"<code>\1</code>", escape(text))


def _pictures(scores: Scores, losses: Tensor, temperature: float) -> list[str]:
    weights, unit = weigh(losses, temperature), unit_of(scores.metadata)
    pictures = [
        picture(
            "Distribution of losses", lambda axes: draw_losses(axes, losses, temperature, unit)
        ),
        picture("Distribution of weights", lambda axes: draw_weights(axes, weights)),
    ]
    if (scores.counts != 1).any():
        counts = scores.counts[~scores.losses.isnan()]
        pictures.append(
            picture("Loss against length", lambda axes: draw_lengths(axes, losses, counts, unit))
        )
    return ['<div class="pictures">', *pictures, "</div>"]


def _odd(oddities: Oddities, scores: Scores) -> str:
    """How many samples bear each mark, each with a button that shows them in the table."""
    numbers = {name: int(marks.sum()) for name, marks in oddities.marks.items() if marks.any()}
    lines = []
    for name, total in numbers.items():
        meaning = meaning_of(name, total, scores.counts)
        if name == "unreadable":
            meaning += f": {spelt_out(reasons_in(scores.metadata))}"
        lines.append(
            f"<li><b>{total:,}</b>{escape(meaning, quote=False)}"
            f'<button type="button" data-mark="{name}" hidden>show</button></li>'
        )
    if remark := length_remark(scores.losses, scores.counts, scores.metadata):
        lines.append(f"<li><b></b>{remark}</li>")
    details = scores.metadata.get("details") or {}
    if num_cut := details.get("num_cut", 0):
        lines.append(
            f"<li><b>{num_cut:,}</b>{'sample was' if num_cut == 1 else 'samples were'} longer than "
            f"{details.get('max_length'):,} tokens and {'was' if num_cut == 1 else 'were'} cut; "
            f"{details.get('num_cut_targets', 0):,} of them lost part or all of their target</li>"
        )
    return f'<ul class="odd">{"".join(lines)}</ul>' if lines else "<p>Nothing that we look for.</p>"


def _table(
    scores: Scores,
    losses: Tensor,
    summary: Mapping[str, Any],
    texts: Sequence[SampleText] | None,
    oddities: Oddities,
    words: Callable[[int], Sequence[str]] | None,
    addresses: Mapping[int, str] | None,
) -> str:
    """The table of all samples, with the temperature's slider."""
    columns = [Column("loss", scores.losses)]
    if (scores.counts != 1).any():
        columns.append(Column("targets", scores.counts))
    columns += [Column(name, values) for name, values in scores.columns.items()]
    first = summary["temperature"]
    rules = {summary["temperature_rule"]: (float(first), origin_of(first))}
    unit = unit_of(scores.metadata)
    has_tokens = scores.flat_token_losses is not None
    return table(
        columns,
        hardest=_hardest_first(scores),
        texts=texts,
        temperatures=rules | temperatures(losses) | rules,
        oddities=oddities,
        tokens=Tokens(scores.token_losses, words, unit) if has_tokens else None,
        addresses=addresses,
    )


def _hardest_first(scores: Scores) -> Tensor:
    """The samples by falling loss (N,) int64; those without one come first."""
    return scores.losses.nan_to_num(torch.inf).argsort(descending=True, stable=True)


def _figures(summary: Mapping[str, Any], unit: str) -> list[tuple[str, str]]:
    rule, samples, missing = (summary[name] for name in ("temperature_rule", "samples", "missing"))
    things = "sample" if samples == 1 else "samples"
    figures = [
        (f"{samples:,}", things + f", {missing:,} without a loss" * (missing > 0)),
        (number(summary["loss"]["mean"]), in_unit("mean loss", unit)),
        (
            number(summary["temperature"]),
            "temperature" + ("" if rule == "given" else f" ({rule})"),
        ),
        (number(summary["weight"]["mean"]), "mean weight"),
    ]
    if samples - missing < FEWEST:  # of few the share says nothing of the data
        return figures
    return [
        *figures,
        (f"{summary['effective_sample_size']:,.0f}", "effective sample size"),
        (percent(summary["effective_share"]), "of the samples, effectively"),
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
    texts: Sequence[SampleText] | None,
    addresses: Mapping[int, str],
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
        text = None if texts is None else texts[index]
        items.append(sample_item(index, facts, weight, text, image=addresses.get(index)))
    return sample_list(items)
