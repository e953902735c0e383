"""The page of a comparison: which samples a fine-tuning learned, and which it forgot."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from torch import Tensor

from flowdata.report.markdown import count
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
from flowdata.report.pictures import BLUE, GREEN, IN_VIEW, ORANGE, bins, mark, sample_points
from flowdata.report.samples import SampleText
from flowdata.report.summary import in_unit, unit_of
from flowdata.report.table import Column, table
from flowdata.report.thumbnails import thumbnails

if TYPE_CHECKING:
    from flowdata.scores import Scores

_COLOURS = {"learned": GREEN, "forgotten": ORANGE, "unchanged": BLUE}


def render_comparison(
    before: Scores,
    after: Scores,
    summary: Mapping[str, Any],
    learned: Sequence[int],
    forgotten: Sequence[int],
    samples: Callable[[int], SampleText] | None,
    images: Callable[[int], Any] | None,
) -> str:
    """Return the HTML page.

    Args:
        before: of the frozen model, N samples.
        after: of the tuned model, on the same samples.
        summary: as `Comparison.summary` returns it.
        learned: the samples to list whose losses fell, the first the most.
        forgotten: those whose losses rose, the first the most.
        samples: gives the text of sample i; None shows numbers alone.
        images: gives the image of sample i, as `thumbnail` takes it; None shows none.
    """
    differences = after.losses - before.losses
    most_changed = differences.abs().nan_to_num(0).argsort(descending=True, stable=True)
    order = [*learned, *forgotten, *most_changed.tolist()]
    addresses = None if images is None else thumbnails(images, order)
    texts = [None if samples is None else samples(index) for index in range(len(before))]
    is_there = ~differences.isnan()
    pairs = before.losses[is_there], after.losses[is_there]
    unit = unit_of(before.metadata)
    body = [
        tiles(_figures(summary, *pairs, unit)),
        '<div class="pictures">',
        picture(
            "Distribution of changes",
            lambda axes: _draw_changes(axes, differences[is_there], unit),
        ),
        picture("Losses before and after", lambda axes: _draw_pairs(axes, *pairs, unit)),
        "</div>",
        "<h2>All samples</h2>",
        _table(before, after, differences, most_changed, texts, addresses),
    ]
    largest = float(differences[is_there].abs().max())
    for title, note, indices, colour in (
        ("Learned most", "Their losses fell most.", learned, "accent"),
        (
            "Forgotten most",
            "Their losses rose most. Of the new task's samples they are those that others pushed "
            "aside: look for wrong labels.",
            forgotten,
            "warn",
        ),
    ):
        body.append(f"<h2>{title}</h2><p>{note if indices else 'None.'}</p>")
        if indices:
            shown = [(addresses or {}).get(i) for i in indices]
            items = [
                _item(i, before, after, largest, texts[i], image, colour)
                for i, image in zip(indices, shown, strict=True)
            ]
            body.append(sample_list(items))
    for title, scores in (("Before", before), ("After", after)):
        if scores.metadata:
            body += [f"<h2>{title}: how the losses were made</h2>", definitions(scores.metadata)]
    return page("What was learned and what was forgotten", body)


def _table(
    before: Scores,
    after: Scores,
    differences: Tensor,
    most_changed: Tensor,
    texts: Sequence[SampleText | None],
    addresses: Mapping[int, str] | None,
) -> str:
    """The table of all samples, both losses beside each other."""
    columns = [
        Column("change", differences, is_signed=True),
        Column("before", before.losses),
        Column("after", after.losses),
    ]
    if (before.counts != 1).any():
        columns.append(Column("targets", before.counts))
    return table(
        columns,
        hardest=most_changed,
        texts=[text for text in texts if text is not None] or None,
        addresses=addresses,
    )


def _figures(
    summary: Mapping[str, Any], before: Tensor, after: Tensor, unit: str
) -> list[tuple[str, str]]:
    compared, missing = summary["compared"], summary["samples"] - summary["compared"]
    without = f", {missing:,} without both losses" * (missing > 0)
    return [
        (f"{compared:,}", f"sample{'s' * (compared != 1)} compared{without}"),
        (number(before.double().mean().item()), in_unit("mean loss before", unit)),
        (number(after.double().mean().item()), "mean loss after"),
        (_signed(summary["mean_difference"]), "mean change"),
        (percent(summary["learned"] / compared), "of them learned (a smaller loss)"),
        (percent(summary["forgotten"] / compared), "of them forgotten (a larger one)"),
    ]


def _item(
    index: int,
    before: Scores,
    after: Scores,
    largest: float,
    text: SampleText | None,
    image: str | None,
    colour: str,
) -> str:
    """A sample with its losses; the bar's length is the change beside the largest one."""
    old, new = float(before.losses[index]), float(after.losses[index])
    facts = {"change": _signed(new - old), "before": number(old), "after": number(new)}
    targets = int(before.counts[index])
    if targets != 1:
        facts["targets"] = f"{targets:,}"
    return sample_item(index, facts, abs(new - old) / largest, text, image=image, colour=colour)


def _draw_changes(axes: Any, differences: Tensor, unit: str) -> None:
    """Draw how the changes (n,) are distributed: what fell in one colour, what rose in another."""
    values = differences.double().numpy()
    sizes = np.abs(values)
    top = float(np.quantile(sizes, IN_VIEW)) or float(sizes.max()) or 1.0
    clipped = np.clip(values, -top, top)
    # As many bars on either side of 0, so that each has one colour.
    edges = np.linspace(-top, top, 2 * (len(bins(len(values), 0.0, top)) - 1) + 1)
    parts = {"learned": values < 0, "forgotten": values > 0, "unchanged": values == 0}
    parts = {name: part for name, part in parts.items() if part.any()}
    axes.hist(
        [clipped[part] for part in parts.values()],
        bins=edges,
        stacked=True,
        color=[_COLOURS[name] for name in parts],
        alpha=0.85,
        label=[f"{name}: {part.sum():,}" for name, part in parts.items()],
    )
    mark(axes, float(values.mean()), "mean", color=BLUE)
    further = int((sizes > top).sum())
    axes.set(
        title="Change of loss",
        xlabel=in_unit("loss after less loss before", unit)
        + f"; the outer bars hold {count(further, 'larger one')}" * (further > 0),
        ylabel="samples",
        xlim=(-top, top),
    )
    axes.margins(y=0.14)  # room for the mark's name
    axes.legend(loc="best", fontsize=9)


def _draw_pairs(axes: Any, before: Tensor, after: Tensor, unit: str) -> None:
    """Draw each sample's loss after against that before; the line is where nothing changed."""
    places, size = sample_points(len(before))
    x, y = before[places].double().numpy(), after[places].double().numpy()
    top = 1.05 * float(np.quantile(np.concatenate([x, y]), IN_VIEW)) or 1.0
    low = min(0.0, float(x.min()), float(y.min()))
    axes.axline((low, low), slope=1, color=BLUE, zorder=1, linewidth=1.2, linestyle="--")
    parts = {"learned": y < x, "forgotten": y > x, "unchanged": y == x}
    for name, is_part in parts.items():
        axes.scatter(
            np.minimum(x[is_part], top),
            np.minimum(y[is_part], top),
            s=size,
            color=_COLOURS[name],
            alpha=0.6,
            linewidths=0,
        )
    axes.set(
        title="Each sample",
        xlabel=in_unit("loss before", unit) + "; larger losses at the edge" * bool((x > top).any()),
        ylabel=in_unit("loss after", unit),
        xlim=(low, top),
        ylim=(low, top),
    )
    axes.grid(True, axis="both")


def _signed(value: float) -> str:
    return ("+" if value > 0 else "−" if value < 0 else "") + number(abs(value))
