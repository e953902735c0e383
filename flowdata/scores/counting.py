"""Whether a part of scores fits samples, as far as their numbers of targets tell.

No content can be compared with a part of scores. But each score says of how many targets it was
made, and labels say how many a sample has: rows in another order, or cut elsewhere, mostly differ.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
from torch import Tensor

from flowdata._common.excerpts import FROM_0
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.errors import ScoreMismatchError
from flowdata.targets.labels import IGNORE_INDEX

_LOSSES_OF_LABELS = ("causal_lm", "seq2seq_lm", "masked_lm", "cross_entropy")  # that count them
_MOST_COMPARED = 4096  # samples, from all over the data set: reading one may be slow


def compare_counts(counts: Tensor, loss: Any, dataset: Any, *, skips: bool) -> int:
    """Return of how many samples the number of targets could be compared with that of its score.

    Up to 4,096 samples are read, from all over the data set.

    Args:
        counts: (N,) int64, the scores'.
        loss: the name of the loss that they were made by, or what stands for a function.
        dataset: map-style, N samples.
        skips: whether samples that can't be read are passed over.

    Raises:
        ScoreMismatchError: a sample has another number of targets than its score was made of.
    """
    if loss not in _LOSSES_OF_LABELS:
        return 0
    readable, compared = Readable(dataset, skip=skips), 0
    places = np.linspace(0, len(dataset) - 1, min(len(dataset), _MOST_COMPARED)).astype(int)
    with preserved_rng(seed=0):
        for place in places.tolist():
            here = targets_of(readable[place], is_shifted=loss == "causal_lm")
            if here is None:
                continue
            if here != counts[place]:
                raise ScoreMismatchError(_other_counts(place, here, int(counts[place])))
            compared += 1
    return compared


def targets_of(sample: Any, *, is_shifted: bool) -> int | None:
    """Return how many targets a sample's labels are; None where they don't tell.

    Args:
        sample: perhaps a mapping with `labels`, one for each of its tokens.
        is_shifted: whether each position predicts the next token, so that the first is no target.

    Example:
        >>> targets_of({"labels": [5, -100, 6, 7]}, is_shifted=True)
        2
    """
    if isinstance(sample, Unreadable) or not isinstance(sample, Mapping):
        return None
    labels = sample.get("labels")
    if labels is None or np.ndim(labels) != 1:
        return None
    values, mask = np.asarray(labels), sample.get("attention_mask")
    if values.dtype.kind not in "iu" and values.size:  # probabilities, or words
        return None
    if mask is not None and not np.asarray(mask).all():  # padding, whose labels play no part
        return None
    return int((values[is_shifted:] != IGNORE_INDEX).sum())


def _other_counts(place: int, here: int, scored: int) -> str:
    targets = "1 target" if here == 1 else f"{here:,} targets"
    return (
        f"these scores are a part of others, and not of this data set: row {place:,} has "
        f"{targets}, its score was made of {scored:,} ({FROM_0}); select rows and scores by the "
        "same indices, [rows[i] for i in keep] and scores[keep], and make the rows' tokens and "
        "labels as they were scored; or pass scores.weights() if the rows are those that were "
        "scored"
    )
