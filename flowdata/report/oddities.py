"""What is odd in a data set: copies, contradictions, empty samples, and losses that stand out.

Or losses that go by the length of samples.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowdata.report.samples import SampleText
from flowdata.report.summary import FEWEST, NATS
from flowdata.targets.which_loss import LANGUAGE_LOSSES

_STANDING_OUT = 5.0  # robust standard deviations above the median from which a loss stands out
_LEAST_NATS = 0.1  # above the median, too: a tenth less likely
_LEAST = 1e-6  # of losses in another unit
_MOST_GROUPS = 10  # by length
_MOST_REASONS = 3  # that are told
_STRONG = 0.5  # a rank correlation from which losses go by the length
_TO_DEVIATION = 1.4826  # a normal distribution's standard deviation by its median deviation

# The marks a sample may bear, by name, each with what it means, of one sample and of several.
MARKS = {
    "outlier": (
        "outlier: its loss lies far above those of samples as long. It may be wrong, or right and "
        "hard; where many are wrong, none stands out",
        "outliers: their losses lie far above those of samples as long. They may be wrong, or "
        "right and hard; where many are wrong, none stands out",
    ),
    "copy": (
        "copy: the same text as an earlier sample",
        "copies: the same text as an earlier sample",
    ),
    "contradiction": (
        "contradiction: the same prompt has another target elsewhere",
        "contradictions: the same prompt has another target elsewhere",
    ),
    "cut": (
        "sample as long as the longest allowed, which was cut or just fits",
        "samples as long as the longest allowed, which were cut or just fit",
    ),
    "unreadable": ("row could not be read", "rows could not be read"),
    "empty": (
        "sample without a target, or with one that is blank",
        "samples without a target, or with one that is blank",
    ),
    "no loss": ("sample without a loss", "samples without a loss"),
}


def meaning_of(mark: str, number: int, counts: Tensor) -> str:
    """Return what a mark means, as a page lists it.

    Args:
        mark: one of `MARKS`.
        number: how many samples bear it.
        counts: (N,) int64, targets of each sample: where all have as many, none is longer.
    """
    meaning = MARKS[mark][number > 1]
    if len(counts[counts > 0].unique()) <= 1:
        return meaning.replace("those of samples as long", "the others'")
    return meaning


def reasons_in(metadata: Mapping[str, Any]) -> str:
    """Return why samples could not be read, by their scores' metadata; of many the first few.

    Example:
        >>> reasons_in({"skipped": {"3": "ValueError: row 3: it has no text"}})
        'row 3: it has no text'
    """
    # Whoever refuses a row says what is wrong with it in a ValueError; others' names tell more.
    reasons = [reason.removeprefix("ValueError: ") for reason in metadata["skipped"].values()]
    return "; ".join(reasons[:_MOST_REASONS]) + "; …" * (len(reasons) > _MOST_REASONS)


@dataclass(frozen=True)
class Oddities:
    """What is odd in N samples.

    Attributes:
        marks: (N,) bool by name, the names of `MARKS`.
        first: (N,) int64, the first sample with the same text: i itself where there is none before.
    """

    marks: dict[str, NDArray[np.bool_]]
    first: NDArray[np.int64]


def find_oddities(
    losses: Tensor,
    counts: Tensor,
    texts: Sequence[SampleText] | None = None,
    is_cut: NDArray[np.bool_] | None = None,
    *,
    unit: str = NATS,
    unreadable: Collection[int] = (),
) -> Oddities:
    """Return what is odd in samples.

    Args:
        losses: (N,) floating; NaN where there is none.
        counts: (N,) int64, targets of each sample.
        texts: of all samples, or None where they are not known.
        is_cut: (N,), as `write_report` takes it.
        unit: of the losses, see `unit_of`.
        unreadable: samples that could not be read, which are not known to be empty.

    Example:
        >>> import torch
        >>> texts = ["a", "b", "a"]
        >>> odd = find_oddities(torch.tensor([1.0, 2.0, 1.0]), torch.ones(3), texts)
        >>> odd.marks["copy"].tolist(), odd.first.tolist()
        ([False, False, True], [0, 1, 0])
    """
    values, lengths = losses.double().numpy(), counts.numpy()
    none = np.zeros(len(values), dtype=np.bool_)
    is_read = ~none
    is_read[[*unreadable]] = False
    marks = {
        "outlier": _outliers(values, lengths, _LEAST_NATS if unit == NATS else _LEAST),
        "copy": none,
        "contradiction": none,
        "cut": none if is_cut is None else is_cut,
        "unreadable": ~is_read,
        "empty": lengths == 0,
        "no loss": np.isnan(values),
    }
    first = np.arange(len(values))
    if texts is not None:
        pairs = [_prompt_and_target(text) for text in texts]
        first = _first_places(pairs)
        marks["copy"] = first < np.arange(len(values))
        marks["contradiction"] = _contradictions(pairs)
        marks["empty"] |= np.array([not target.strip() for _, target in pairs], dtype=np.bool_)
    marks["empty"] &= is_read
    return Oddities(marks, first)


def length_remark(losses: Tensor, counts: Tensor, metadata: Mapping[str, Any]) -> str:
    """Return a sentence where losses rise or fall with the number of targets, else ``""``.

    Args:
        losses: (N,) floating; NaN where there is none.
        counts: (N,) int64, targets of each sample.
        metadata: the scores'; the loss tells whether samples are replies.

    Example:
        >>> import torch
        >>> remark = length_remark(torch.arange(20.0), torch.arange(20), {})
        >>> remark[:63]
        'samples of many targets are the hard ones: weights would mostly'
        >>> length_remark(torch.arange(19.0), torch.arange(19), {})
        ''
    """
    is_there = ~losses.isnan().numpy()
    if is_there.sum() < FEWEST:
        return ""
    ranks = [_ranks(values.numpy()[is_there]) for values in (losses, counts)]
    if any(np.ptp(each) == 0 for each in ranks):
        return ""
    correlation = float(np.asarray(np.corrcoef(ranks))[0, 1])
    if abs(correlation) < _STRONG:
        return ""
    is_text = (metadata.get("identity") or {}).get("loss") in LANGUAGE_LOSSES
    kinds = ("short replies", "long replies")
    if not is_text:
        kinds = ("samples of few targets", "samples of many targets")
    hard = kinds[correlation > 0]
    return (
        f"{hard} are the hard ones: weights would mostly discount {hard} (rank correlation of loss "
        f"and number of targets: {correlation:+.2f})".replace("-", "−")
    )


def _ranks(values: NDArray[Any]) -> NDArray[np.float64]:
    """The rank of each value (N,); equal ones share the mean of theirs."""
    _, places, sizes = np.unique(values, return_inverse=True, return_counts=True)
    ranks: NDArray[np.float64] = np.asarray(np.cumsum(sizes) - (sizes - 1) / 2)
    return ranks[places]


def _outliers(
    losses: NDArray[np.float64], lengths: NDArray[np.int64], least: float
) -> NDArray[np.bool_]:
    """Where a loss lies far above the median of samples that have about as many targets.

    The mean over few targets varies more than that over many, so that one bound for all would
    mark short samples alone. Where most losses lie next to 0 their spread is so small that it says
    nothing: an outlier is also `least` above the median.
    """
    is_outlier = np.zeros(len(losses), dtype=np.bool_)
    present = np.flatnonzero(np.isfinite(losses))
    if len(present) < FEWEST:
        return is_outlier
    num_groups = int(np.clip(len(present) // FEWEST, 1, _MOST_GROUPS))
    edges = np.unique(np.quantile(lengths[present], np.linspace(0, 1, num_groups + 1)[1:-1]))
    groups = np.searchsorted(edges, lengths[present], side="left")
    for group in np.unique(groups):
        samples = present[groups == group]
        if len(samples) < FEWEST:
            continue
        above = losses[samples] - np.median(losses[samples])
        deviation = _TO_DEVIATION * np.median(np.abs(above))
        is_outlier[samples] = above > np.maximum(_STANDING_OUT * deviation, least)
    return is_outlier


def _prompt_and_target(text: SampleText) -> tuple[str, str]:
    """A sample's prompt and target; of text without parts all is target."""
    if isinstance(text, str):
        return "", text
    prompt = "\0".join(piece.text for piece in text if not piece.is_target)
    return prompt, "\0".join(piece.text for piece in text if piece.is_target)


def _first_places(pairs: Sequence[tuple[str, str]]) -> NDArray[np.int64]:
    places: dict[tuple[str, str], int] = {}
    return np.array([places.setdefault(pair, i) for i, pair in enumerate(pairs)], dtype=np.int64)


def _contradictions(pairs: Sequence[tuple[str, str]]) -> NDArray[np.bool_]:
    targets: dict[str, set[str]] = {}
    for prompt, target in pairs:
        targets.setdefault(prompt, set()).add(target)
    return np.array(
        [bool(prompt.strip()) and len(targets[prompt]) > 1 for prompt, _ in pairs], dtype=np.bool_
    )
