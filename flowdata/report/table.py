"""The table of all samples on a page: its data, packed small, and the script that shows it.

The data are one JSON object, compressed and in base64, so that no text of a sample can end the
element that holds it. Arrays are base64 of little-endian values. table.js reads what `_payload`
writes; both change together.
"""

from __future__ import annotations

import base64
import gzip
import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowdata._common.excerpts import FROM_0
from flowdata.report.markdown import count as count_of
from flowdata.report.oddities import MARKS, Oddities
from flowdata.report.samples import SampleText, is_longer, shorten, spelt_out
from flowdata.report.summary import FEWEST, NATS

# A page of 100,000 samples should open at once and travel by mail.
_MOST_CHARACTERS = 20_000_000  # of all texts together
_MOST_OF_ONE, _LEAST_OF_ONE = 2000, 120  # characters of one sample, in small and large data sets
_MOST_TOKENS = 1_000_000  # of all token losses together
_MOST_TOKENS_OF_ONE = 1000
_STEPS = 16  # of a kept token loss in a nat
_LARGEST, _NONE = 254, 255  # 15.9 nats and more, and a token without a loss


@dataclass(frozen=True)
class Column:
    """A column of numbers.

    Attributes:
        name: its heading.
        values: (N,) numbers; NaN where there is none.
        is_signed: whether its sign is shown: a change.
    """

    name: str
    values: Tensor
    is_signed: bool = False


@dataclass(frozen=True)
class Tokens:
    """The losses of samples' targets.

    Attributes:
        losses: gives those of sample i, (T,).
        words: gives their texts, T; None where they are not known.
        unit: of the losses, see `unit_of`.
    """

    losses: Callable[[int], Tensor]
    words: Callable[[int], Sequence[str]] | None = None
    unit: str = NATS


def table(
    columns: Sequence[Column],
    *,
    hardest: Tensor,
    texts: Sequence[SampleText] | None = None,
    temperatures: Mapping[str, tuple[float, float]] | None = None,
    oddities: Oddities | None = None,
    tokens: Tokens | None = None,
    addresses: Mapping[int, str] | None = None,
) -> str:
    """Return the table of all samples.

    Args:
        columns: one or more; the weights are made of the first.
        hardest: (N,) int64, the samples in the order in which room is given to their texts and
            tokens, where there is not enough for all.
        texts: of all samples.
        temperatures: temperature and origin by the name of the rule; the first is shown at first.
            None shows no weights.
        oddities: marks samples.
        tokens: the losses of their targets.
        addresses: of thumbnails, by sample; None shows no images.
    """
    num_texts, limit = 0, 0
    if texts is not None:
        num_texts = min(len(texts), _MOST_CHARACTERS // _LEAST_OF_ONE)
        limit = min(_MOST_OF_ONE, _MOST_CHARACTERS // num_texts)
    payload = {
        "count": len(hardest),
        "columns": [
            {"name": each.name, "values": _packed(each.values, "<f4"), "isSigned": each.is_signed}
            for each in columns
        ],
        "temperatures": temperatures,
        "fewest": FEWEST,
        "marks": _marks(oddities),
        "texts": None if texts is None else _texts(texts, hardest[:num_texts].tolist(), limit),
        "tokens": None if tokens is None else _token_losses(tokens, hardest.tolist()),
        "images": addresses,
    }
    content = gzip.compress(json.dumps(payload, separators=(",", ":")).encode(), 6, mtime=0)
    script = Path(__file__).with_name("table.js").read_text(encoding="utf-8")
    style = Path(__file__).with_name("table.css").read_text(encoding="utf-8")
    return _TEMPLATE.format(
        numbers=f"{FROM_0.capitalize()}.",
        search="#12" if texts is None else "Search the texts, or #12",
        note=_note(texts, num_texts, limit, payload["tokens"], len(hardest), addresses),
        data=base64.b64encode(content).decode(),
        script=script,
        style=style,
    )


def _note(texts: Any, num_texts: int, limit: int, tokens: Any, count: int, addresses: Any) -> str:
    """What the table holds of texts, tokens and images, in words."""
    notes = []
    if texts is not None and num_texts < len(texts):
        notes.append(
            f"The first {limit:,} characters of the hardest {num_texts:,} samples are here, for "
            "the search too."
        )
    elif texts is not None and any(is_longer(text, limit) for text in texts):
        notes.append(f"The first {limit:,} characters of each sample are here, for the search too.")
    if tokens is not None:
        notes.append(
            f"Token losses are kept for {count_of(len(tokens['samples']), 'sample')}, the hardest "
            f"first, and for the first {_MOST_TOKENS_OF_ONE:,} targets of each."
        )
    if addresses is not None and len(addresses) < count:
        notes.append(f"The images of {count_of(len(addresses), 'sample')} are here.")
    return " ".join(notes)


def _packed(values: Tensor | NDArray[Any], dtype: str) -> str:
    return base64.b64encode(np.asarray(values).astype(dtype).tobytes()).decode()


def _marks(oddities: Oddities | None) -> dict[str, Any] | None:
    """The marks of samples, a bit for each name in order, and where copies were first."""
    if oddities is None:
        return None
    bits = np.zeros(len(oddities.first), dtype=np.uint8)
    for place, name in enumerate(MARKS):
        bits |= oddities.marks[name].astype(np.uint8) << place
    return {
        "names": list(MARKS),
        "bits": _packed(bits, "u1"),
        "first": _packed(oddities.first, "<i4"),
    }


def _texts(texts: Sequence[SampleText], samples: Sequence[int], limit: int) -> dict[str, Any]:
    """For each sample its pieces, each the number of who speaks and what they say."""
    speakers: dict[tuple[str, bool], int] = {}
    rows: list[list[Any] | int] = [0] * len(texts)  # 0 where there was no room
    for index in samples:
        rows[index] = [
            part
            for piece in shorten(texts[index], limit)
            for part in (
                speakers.setdefault((piece.role, piece.is_target), len(speakers)),
                piece.text,
            )
        ]
    return {"speakers": list(speakers), "rows": rows}


def _token_losses(tokens: Tokens, samples: Sequence[int]) -> dict[str, Any]:
    """The losses of samples' targets, until there is no more room."""
    chosen, parts, words, room = [], [], [], _MOST_TOKENS
    for index in samples:
        losses = tokens.losses(index)[:_MOST_TOKENS_OF_ONE]
        if len(losses) > room:
            break
        room -= len(losses)
        chosen.append(index)
        parts.append((losses * _STEPS).round().clamp(0, _LARGEST).nan_to_num(_NONE).numpy())
        if tokens.words is not None:
            words.append([spelt_out(word) for word in list(tokens.words(index))[: len(losses)]])
    return {
        "samples": chosen,
        "lengths": [len(part) for part in parts],
        "losses": _packed(np.concatenate([np.zeros(0), *parts]), "u1"),
        "steps": _STEPS,
        "largest": _LARGEST,
        "none": _NONE,
        "unit": tokens.unit,
        "words": words if tokens.words is not None else None,
    }


_TEMPLATE = """<style>{style}</style>
<p id="waiting">The table appears in browsers that run scripts, of 2023 or later.</p>
<p>A click on a heading sorts, one on a row shows the sample. {numbers} {note}</p>
<section id="explorer" hidden>
<div class="temperature" hidden>
<label>temperature <input type="range" id="temperature" min="0" max="1" step="any"></label>
<span id="rules"></span>
<output id="effect" for="temperature"></output>
</div>
<div class="search">
<input type="search" id="search" placeholder="{search}" aria-label="Search">
<select id="marks" aria-label="Which samples"></select>
<button type="button" id="save">Save these rows as CSV</button>
<output id="number"></output>
</div>
<div id="view" tabindex="0" role="table" aria-label="Samples">
<div id="head" role="row"></div><div id="rows" role="rowgroup"></div><div id="pad"></div>
</div>
<div id="sample" aria-live="polite"></div>
</section>
<script type="text/plain" id="data">{data}</script>
<script type="module">{script}</script>"""
