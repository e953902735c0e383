"""Weights that ride through what a Trainer does to its data set: shuffling, filtering, cutting.

Trainers such as TRL's prepare the data themselves, so that the rows they train on are other rows,
or in another order, than those that were scored. A column stays with its row; an index does not.
"""

from __future__ import annotations

import reprlib
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import torch
from datasets import Dataset
from numpy.typing import NDArray
from torch import Tensor

from flowdata._common.data_sets import is_map_style
from flowdata._common.notices import warn_once
from flowdata.collator import WeightedCollator
from flowdata.scores import Scores
from flowdata.scores.matching import rows_identity
from flowdata.store.fingerprint.rows import digest_tokens

_ROWS_AT_ONCE = 4096
_LISTS = (pa.types.is_list, pa.types.is_large_list, pa.types.is_fixed_size_list)


def add_weights(dataset: Any, weights: Tensor, key: str) -> Any:
    """Return a Hugging Face data set with its weights as a float32 column; any other as it is.

    Args:
        dataset: N samples.
        weights: (N,) floating.
        key: the column's name.
    """
    if not isinstance(dataset, Dataset):
        return dataset
    return dataset.add_column(key, weights.float().numpy())


def take_weights(prepared: Any, given: Any, weights: Tensor, key: str) -> tuple[Any, Tensor]:
    """Return what a Trainer made of a data set, without the column, and the weights that remain.

    Args:
        prepared: the data set that the Trainer trains on.
        given: what `add_weights` returned, and the Trainer was given.
        weights: (N,) floating, of the samples of `given`.
        key: the column's name.

    Raises:
        ValueError: the Trainer made another data set, and no weights are in it.
    """
    names = (prepared.column_names or ()) if isinstance(prepared, Dataset) else ()
    if key in names:
        column = prepared.with_format("numpy", columns=[key])[:][key]
        return prepared.remove_columns(key), torch.tensor(column, dtype=torch.float32)
    if prepared is not given:
        raise ValueError(
            "the Trainer made another data set of train_dataset, and the weights did not come "
            f"along in a column {key!r}, so nobody knows which sample has which; prepare the data "
            "set first, score what comes out, and pass that"
        )
    return prepared, weights


def check_weight_column(dataset: Any, key: str) -> None:
    """Refuse a Hugging Face data set whose column of weights has unusable ones.

    The column alone is read, a part at a time. What a transform makes of it is left to the
    collator.

    Args:
        dataset: the training data.
        key: the column's name; a number for each row, or a list of one for each token.

    Raises:
        ValueError: a weight is null, negative or not finite.
    """
    is_column = isinstance(dataset, Dataset) and key in dataset.column_names
    if not is_column or dataset.format["type"] == "custom":
        return
    rows: list[int] = []
    parts = dataset.select_columns(key).with_format("arrow").iter(_ROWS_AT_ONCE)
    for number, part in enumerate(parts):
        bad = _unusable(part[key].combine_chunks())
        rows += (number * _ROWS_AT_ONCE + bad).tolist()
    if rows:
        first = dataset.select_columns(key).with_format(None)[rows[0]][key]
        raise ValueError(
            f"{len(rows):,} of the {len(dataset):,} rows of train_dataset have no usable {key!r}, "
            f"the first of them is row {rows[0]}: {reprlib.repr(first)}; weights must be finite "
            "and >= 0. Drop such rows (rows.filter(...), `flowdata weigh --missing drop`), or give "
            "them 0"
        )


def _unusable(column: pa.Array) -> NDArray[np.int64]:
    """The rows of a column whose weight, or that of one of their tokens, is no usable one."""
    values, row_of_value = column, np.arange(len(column))
    is_bad = column.is_null().to_numpy(zero_copy_only=False)
    if any(is_kind(column.type) for is_kind in _LISTS):
        lengths = pc.list_value_length(column).fill_null(0)
        values, row_of_value = column.flatten(), np.repeat(row_of_value, lengths.to_numpy())
    if not (pa.types.is_integer(values.type) or pa.types.is_floating(values.type)):
        return np.flatnonzero(is_bad)
    numbers = values.cast(pa.float32(), safe=False).to_numpy(zero_copy_only=False)
    is_bad[row_of_value[~((numbers >= 0) & (numbers < np.inf))]] = True
    return np.flatnonzero(is_bad)


def remark_on_tokens(prepared: Any, scores: Any, max_length: int | None) -> None:
    """Warn where a Trainer makes other tokens of rows than those that the command line scored.

    The rows are those that were scored, so that their weights are no one else's; but they tell how
    hard something else is than what is trained on: a row cut elsewhere, or in another template.

    Args:
        prepared: what the Trainer made of the rows, in their order.
        scores: as the Trainer was given them.
        max_length: the length at which the Trainer cuts; None where it does not.
    """
    rows = rows_identity(scores.metadata) if isinstance(scores, Scores) else None
    if rows is None or "tokens" not in rows or "input_ids" not in prepared.column_names:
        return
    if len(prepared) == len(scores) and _digest_of(prepared) == rows["tokens"]:
        return  # rows of which nothing is left to learn are dropped
    scored_length = scores.metadata.get("details", {}).get("max_length")
    warn_once(
        "the trainer makes other tokens of the rows than those that were scored: it cuts them at "
        f"max_length={max_length}, they were scored under --max-length {scored_length}, or its "
        "tokenizer or chat template is another. Score them as they are trained on: flowdata score "
        "--max-length, --tokenizer, --chat-template, or --no-template, since TRL puts prompts that "
        "are plain text through no template",
        about="tokens of the prepared data set",
    )


def _digest_of(prepared: Dataset) -> str:
    """The digest of a data set's tokens, as a store keeps it."""
    ids, lengths = [np.zeros(0, np.int32)], [np.zeros(0, np.int64)]
    for batch in prepared.select_columns("input_ids").with_format("arrow").iter(_ROWS_AT_ONCE):
        column = batch["input_ids"].combine_chunks()
        ids.append(column.flatten().to_numpy().astype(np.int32))
        lengths.append(column.value_lengths().to_numpy().astype(np.int64))
    offsets = np.append(0, np.concatenate(lengths).cumsum())
    return digest_tokens(np.concatenate(ids), offsets, None)


def check_not_a_stream(dataset: Any, what: str) -> None:
    """Refuse a stream where a data set is needed whose samples can be counted and drawn.

    Args:
        dataset: the training data.
        what: the argument that needs it, for the message.

    Raises:
        ValueError: it is a stream.
    """
    if not is_map_style(dataset):
        raise ValueError(
            f"{what} needs a data set with a length and an order, got {type(dataset).__name__}; "
            "give a stream's samples their weights with flowdata.FlowWeightedIterable, or as a "
            "column of their own"
        )


class BatchCollator(WeightedCollator):
    """A collator for the Trainer, whose batches are always mappings."""

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch, with its weights as a field."""
        batch = super().__call__(samples)
        if isinstance(batch, tuple) and len(batch) == 2 and isinstance(batch[0], Mapping):
            return {**batch[0], self.key: batch[1]}
        return batch


class EvaluationCollator(BatchCollator):
    """The same for evaluation, whose pairs are an input and its label, which may be floating."""

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the batch; of mappings with the weights that they may have as a field."""
        first = samples[0]
        is_pair = isinstance(first, tuple | list) and not isinstance(first[0], tuple | list)
        return self.collate_fn(list(samples)) if is_pair else super().__call__(samples)
