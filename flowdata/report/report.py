"""A report on a data set's losses: a page and a picture, written into a folder."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from flowdata.report.guessing import guessing_remark
from flowdata.report.html import render
from flowdata.report.oddities import find_oddities
from flowdata.report.pictures import plot_losses
from flowdata.report.samples import SampleText
from flowdata.report.summary import unit_of
from flowdata.report.verdict import Verdict, judge
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
        verdict: what to do, as the page says it first.
    """

    page: Path
    picture: Path
    summary: dict[str, Any]
    verdict: Verdict


def write_report(
    scores: Scores,
    folder: str | Path,
    *,
    temperature: Temperature = "median",
    samples: Callable[[int], SampleText] | None = None,
    top: int = 10,
    words: Callable[[int], Sequence[str]] | None = None,
    is_cut: NDArray[np.bool_] | None = None,
    images: Callable[[int], Any] | None = None,
) -> Report:
    """Write `report.html` and `losses.png` into a folder; return their paths and the figures.

    The page has a verdict in words, pictures, what is odd, and a table of all samples in which they
    can be sorted, searched, read and weighed at any temperature. It stands alone, in one file. Its
    title names data and model as far as the scores know them, as by `LossScorer.score(data,
    details={"data": "CIFAR-10", "model": "ResNet-20"})`.

    Args:
        scores: of N samples.
        folder: made if missing.
        temperature: as in `resolve_temperature`.
        samples: gives the text of sample i, a string or `Piece`s that tell prompt and target apart;
            None shows numbers alone. It is asked once for each sample, and the page holds the
            beginning of each text: 2,000 characters, fewer of more than 10,000 samples.
        top: how many of the easiest and of the hardest samples the page lists.
        words: gives the texts of sample i's targets, one for each of its token losses, if the
            scores hold these; without it their losses are shown as bare squares.
        is_cut: (N,) which samples were cut before they were scored; None where it is not known.
        images: gives the image of sample i: of PIL, or a tensor or array (H, W), (C, H, W) or
            (H, W, C) of 1, 3 or 4 channels. Numbers that are no uint8 are stretched from their
            least to their largest. It is asked for the easiest samples, and for the hardest until
            there are 500 thumbnails. Texts are then captions, in which no copies are looked for.

    Returns:
        The paths of the page and the picture, the summary and the verdict.

    Raises:
        ImportError: matplotlib is not installed.
        TypeError: `images` gives something else.
        ValueError: no sample has a loss, `top` is negative, or the temperature is unusable.
    """
    if top < 0:
        raise ValueError(f"top must be >= 0, got {top}")
    summary, unit = scores.summary(temperature), unit_of(scores.metadata)
    place = Path(folder) / "losses.png"
    picture = plot_losses(scores.losses, place, temperature=temperature, unit=unit)
    texts = None if samples is None else [samples(index) for index in range(len(scores))]
    contents = texts if images is None else None  # what is said of an image is not the sample
    unreadable = [int(index) for index in scores.metadata.get("skipped", {})]
    oddities = find_oddities(
        scores.losses, scores.counts, contents, is_cut, unit=unit, unreadable=unreadable
    )
    guessing = guessing_remark(scores.losses, scores.metadata)
    verdict = judge(scores.losses, scores.counts, summary, oddities, guessing, unit=unit)
    html = render(
        scores,
        summary,
        texts,
        top,
        oddities=oddities,
        verdict=verdict,
        words=words,
        images=images,
    )
    page = Path(folder) / "report.html"
    page.write_text(html, encoding="utf-8")
    return Report(page, picture, summary, verdict)
