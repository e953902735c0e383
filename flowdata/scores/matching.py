"""Whether a data set is the one that was scored: by its content, its rows of text or its tokens."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.excerpts import FROM_0
from flowdata._common.notices import is_first_rank, say
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.errors import ScoreMismatchError
from flowdata.scores.counting import compare_counts
from flowdata.store.fingerprint.containers import is_of_same_samples
from flowdata.store.fingerprint.dataset import random_sample
from flowdata.store.fingerprint.rows import RowsDigest, digest_tokens, first_difference
from flowdata.store.identity import (
    CONTENT_PREFIX,
    PART_PREFIX,
    content_identity,
    dataset_difference,
    fields_of,
    same_rows,
    whole_fingerprint,
)
from flowdata.targets.labels import IGNORE_INDEX

TOKENS_PREFIX = "tokens:"  # of the identity of token samples that were made of rows of text
_ROWS_AT_ONCE = 4096
_TOKEN_OPTIONS = {  # of a store's details, what makes tokens of rows, as a message names it
    "tokenizer": "tokenizer",
    "chat_template": "use of the chat template",
    "template_options": "value of the template's options",
    "max_length": "greatest length",
    "truncation": "truncation",
}
_REMEDY = "score this data set, or pass scores.weights() if its rows are those that were scored"


def check_match(metadata: Mapping[str, Any], counts: Tensor, dataset: Any, *, view: bool) -> None:
    """Check that a data set is the one that scores are of; its length has been compared already.

    Args:
        metadata: the scores'.
        counts: (N,) int64, the scores'.
        dataset: map-style.
        view: whether the transform, format and columns of a Hugging Face data set must be the same
            too; False compares the rows alone.

    Raises:
        ScoreMismatchError: other content, another order, or another view of it; of a part of other
            scores, other numbers of targets.
    """
    identity = str(metadata.get("identity", {}).get("dataset", ""))
    rows = rows_identity(metadata)
    skips = bool(metadata.get("skipped"))
    if rows is not None:
        _check_rows(rows, identity, dataset, skips)
    elif identity.startswith(CONTENT_PREFIX):
        _check_content(identity, dataset, skips, view=view)
    elif identity.startswith(PART_PREFIX):
        loss = metadata["identity"].get("loss")
        _say_of_part(compare_counts(counts, loss, dataset, skips=skips), len(dataset))
    # Else it is a name of the user's own, which no content can be compared with.


def _say_of_part(compared: int, size: int) -> None:
    """Say, for each data set, what a part of scores could not be compared in."""
    agree = f", but for the numbers of targets, which agree in {compared:,} of {size:,}"
    say(
        "these scores are a part of others, and that they are of this data set's samples, in this "
        f"order, can't be checked{agree if compared else ''}: select both by the same indices",
        shown=is_first_rank(),
    )


def rows_identity(metadata: Mapping[str, Any]) -> dict[str, Any] | None:
    """Return the identity of the rows of text that scores are of (`RowsDigest`), None without one.

    Example:
        >>> rows_identity({"details": {"data": {"identity": {"scheme": 1, "count": 3}}}})
        {'scheme': 1, 'count': 3}
    """
    data = metadata.get("details", {}).get("data")
    identity = data.get("identity") if isinstance(data, Mapping) else None
    return dict(identity) if isinstance(identity, Mapping) else None


def identity_of_rows(rows: Iterable[Any], like: Mapping[str, Any]) -> dict[str, Any]:
    """Return the identity of rows by the columns of another identity; what is no row counts too."""
    digest = RowsDigest(like["columns"])
    for _ in digest.watch(rows):
        pass
    return digest.identity()


def rows_difference(rows: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Return what differs between the rows that were scored and others; "" where nothing does.

    Example:
        >>> first, second = RowsDigest(["text"]), RowsDigest(["text"])
        >>> for number in (1, 2):
        ...     first.add({"text": str(number)})
        ...     second.add({"text": str(3 - number)})
        >>> rows_difference(first.identity(), second.identity())
        'its rows are the same in another order; the first is row 0 (rows count from 0)'
    """
    if rows["scheme"] != other["scheme"]:
        return "they were scored by another version of flowdata, which told rows apart otherwise"
    if rows["rows"] == other["rows"]:
        return ""
    where = _where(rows, other)
    if rows["any_order"] == other["any_order"]:
        return f"its rows are the same in another order{where}"
    new = [name for name in other["held"] if name not in rows["held"]]
    if new:
        return f"its column {new[0]!r} holds something, and held nothing in the rows that were read"
    columns = ", ".join(map(repr, rows["held"]))
    return f"its rows are others, or hold something else in {columns}{where}"


def stores_difference(before: Mapping[str, Any], after: Mapping[str, Any]) -> str:
    """Return what differs between the text of two stores in words, "" where they can't tell.

    Args:
        before: the metadata of scores that the command line made.
        after: those of others.
    """
    rows, others = rows_identity(before), rows_identity(after)
    if rows is None or others is None:
        return ""
    if difference := rows_difference(rows, others):
        return f"after is of another data set: {difference}"
    details = [metadata["details"] for metadata in (before, after)]
    changes = [
        f"{flag} (before {details[0].get(name)!r}, after {details[1].get(name)!r})"
        for name, flag in _TOKEN_OPTIONS.items()
        if details[0].get(name) != details[1].get(name)
    ]
    if not changes:
        return ""
    return (
        "the rows are the same, and their tokens are not, for they were made with another "
        f"{' and another '.join(changes)}"
    )


def _where(rows: Mapping[str, Any], other: Mapping[str, Any]) -> str:
    """Where two data sets first differ, as the end of a sentence."""
    place = first_difference(rows, other)
    if place is None:
        return ""
    first, last = place
    end = f" to {last:,}" if last > first else ""
    return f"; the first is row {first:,}{end} ({FROM_0})"


def _check_content(identity: str, dataset: Any, skips: bool, *, view: bool) -> None:
    here = content_identity(dataset, fields=fields_of(identity), skip_unreadable=skips)
    if identity == here or (not view and same_rows(identity, here)):
        return
    is_random = random_sample(dataset, skip_unreadable=skips) is not None
    whole = "" if is_random else whole_fingerprint(identity)
    if whole and is_of_same_samples(whole, dataset, skip_unreadable=skips):
        return
    weights = (
        "pass scores.weights() instead of scores if these are the samples that were scored, in the "
        "same order"
    )
    if is_random:
        raise ScoreMismatchError(
            f"{weights}: this data set gives other samples at each reading, as augmentation does, "
            "so that they can't be compared"
        )
    if same_rows(identity, here):
        remedy = f"{weights}, only transformed otherwise; else score this data set"
    else:
        remedy = (
            f"score this data set, or {weights}, only held by another class, transformed otherwise "
            "or with a column more that the model is not given"
        )
    raise ScoreMismatchError(
        f"{remedy}: the scores were made from another data set of the same length: "
        f"{dataset_difference(identity, here)}. Scores made with dataset_id='a-name' are not "
        "compared by content at all"
    )


def _check_rows(rows: Mapping[str, Any], identity: str, dataset: Any, skips: bool) -> None:
    """Compare rows of text, or the tokens that were made of them, where a data set has no text."""
    with preserved_rng(seed=0):
        first = next(_samples(dataset, skips), None)
        names = set(first) if isinstance(first, Mapping) else set()
        absent = [name for name in rows["held"] if name not in names]
        if not absent:
            here = identity_of_rows(_samples(dataset, skips), rows)
            difference = rows_difference(rows, here)
        elif "input_ids" in names and "tokens" in rows:
            difference = _tokens_difference(rows, identity, dataset, skips)
        else:
            difference = (
                f"its rows have no column {absent[0]!r}, by which they could be told"
                if isinstance(first, Mapping)
                else f"its samples are no rows, but of {type(first).__name__}"
            )
    if difference:
        raise ScoreMismatchError(
            f"the scores are of rows of text, and this is another data set of the same length: "
            f"{difference}; {_REMEDY}"
        )


def _samples(dataset: Any, skips: bool) -> Iterator[Any]:
    """The samples in order; rows of a Hugging Face data set as its table holds them."""
    if hasattr(dataset, "with_format") and hasattr(dataset, "iter"):
        names = dataset.column_names
        for batch in dataset.with_format(None).iter(_ROWS_AT_ONCE):
            for values in zip(*(batch[name] for name in names), strict=True):
                yield dict(zip(names, values, strict=True))
        return
    readable = Readable(dataset, skip=skips)
    for index in range(len(dataset)):
        yield readable[index]


def _tokens_difference(rows: Mapping[str, Any], identity: str, dataset: Any, skips: bool) -> str:
    ids: list[np.ndarray] = []
    targets: list[np.ndarray] | None = []
    for sample in _samples(dataset, skips):
        if isinstance(sample, Unreadable):
            sample = {"input_ids": [], "labels": []}
        tokens = np.asarray(sample["input_ids"])
        mask = sample.get("attention_mask")
        is_there = np.ones(len(tokens), bool) if mask is None else np.asarray(mask).astype(bool)
        ids.append(tokens[is_there].astype(np.int32))
        if targets is not None and sample.get("labels") is not None:
            targets.append(np.asarray(sample["labels"])[is_there] != IGNORE_INDEX)
        else:
            targets = None
    lengths = torch.tensor([len(tokens) for tokens in ids])
    offsets = np.append(0, lengths.cumsum(0).numpy())
    flat = np.concatenate(ids)
    if digest_tokens(flat, offsets, None) != rows.get("tokens"):
        return "its tokens are others than those that were scored, or in another order"
    if targets is None:  # without labels there is nothing more to compare
        return ""
    here = TOKENS_PREFIX + digest_tokens(flat, offsets, np.concatenate(targets))
    return "" if here == identity else "its tokens are the same, and other ones are targets"
