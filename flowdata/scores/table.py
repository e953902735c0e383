"""Scores as a table: a row, a part, a data frame, and what a notebook shows."""

from __future__ import annotations

import hashlib
import html
import operator
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from torch import Tensor

from flowdata._common.offsets import offsets_of
from flowdata.report.markdown import count
from flowdata.store.identity import PART_PREFIX

if TYPE_CHECKING:
    from flowdata.scores.scores import Scores

_MOST_ROWS_SHOWN = 10  # half of them from either end


def row_of(scores: Scores, index: Any) -> dict[str, Any]:
    """Return one sample's values by name: index, loss (NaN: none), count, and the further columns.

    A sample that could not be read has the reason under `skipped`, too.

    Raises:
        TypeError: `index` is no integer.
        IndexError: there is no such sample.
    """
    try:
        position = operator.index(index)
    except TypeError:
        raise _no_index(index) from None
    if not -len(scores) <= position < len(scores):
        raise no_such_row(position, len(scores))
    position %= len(scores)
    row: dict[str, Any] = {"index": position}
    row |= {name: values[position].item() for name, values in _columns(scores).items()}
    reason = scores.metadata.get("skipped", {}).get(str(position))
    return row if reason is None else {**row, "skipped": reason}


def part_of(scores: Scores, selection: Any) -> Scores:
    """Return the scores of some samples, in the order in which they are selected.

    Args:
        scores: of N samples.
        selection: a slice, (n,) indices, or (N,) booleans.

    Raises:
        TypeError: `selection` is none of these.
        IndexError: an index is out of range, or there are not N booleans.
        ValueError: it selects no sample.
    """
    indices = _indices(selection, len(scores))
    if len(indices) == 0:
        raise ValueError(f"the selection holds none of the {len(scores)} samples")
    token_losses = None
    if scores.flat_token_losses is not None:
        token_losses = scores.flat_token_losses[_token_places(scores.counts, indices)]
    return type(scores)(
        scores.losses[indices],
        scores.counts[indices],
        metadata=_metadata_of_part(scores.metadata, indices),
        token_losses=token_losses,
        columns={name: values[indices] for name, values in scores.columns.items()},
    )


def to_frame(scores: Scores) -> Any:
    """Return the scores as a pandas data frame.

    Raises:
        ImportError: pandas is not installed.
    """
    try:
        import pandas
    except ImportError:
        raise ImportError("to_pandas() needs pandas: pip install pandas") from None
    frame = pandas.DataFrame({name: v.numpy().copy() for name, v in _columns(scores).items()})
    skipped = scores.metadata.get("skipped", {})
    if skipped:
        frame["skipped"] = [skipped.get(str(index)) for index in range(len(scores))]
    return frame


def to_html(scores: Scores) -> str:
    """Return the first and the last samples as an HTML table, below a line on all of them."""
    columns = _columns(scores)
    places = list(range(len(scores)))
    if len(places) > _MOST_ROWS_SHOWN:
        places = places[: _MOST_ROWS_SHOWN // 2] + places[-_MOST_ROWS_SHOWN // 2 :]
    lines = []
    for before, place in zip([-1, *places], places, strict=False):
        if place != before + 1:
            lines.append(f"<tr><th>…</th>{'<td>…</td>' * len(columns)}</tr>")
        cells = "".join(f"<td>{_cell(values[place].item())}</td>" for values in columns.values())
        lines.append(f"<tr><th>{place}</th>{cells}</tr>")
    head = "".join(f"<th>{html.escape(name)}</th>" for name in columns)
    return (
        f"<div><p>{html.escape(_caption(scores))}</p><table><thead><tr><th></th>{head}</tr></thead>"
        f"<tbody>{''.join(lines)}</tbody></table></div>"
    )


def no_such_row(index: int, size: int) -> IndexError:
    """Return the error of an index that none of `size` rows has."""
    rows = "1 row, number 0" if size == 1 else f"{size:,} rows, numbered 0 to {size - 1:,}"
    return IndexError(f"sample {index} of {size}: the scores have {rows}")


def _columns(scores: Scores) -> dict[str, Tensor]:
    return {"loss": scores.losses, "count": scores.counts, **scores.columns}


def _caption(scores: Scores) -> str:
    present = scores.losses[~scores.losses.isnan()]
    missing = len(scores) - len(present)
    middle = f", median loss {np.median(present.numpy()):.4g} nats" if len(present) else ""
    return f"Scores of {count(len(scores), 'sample')}{middle}, {missing:,} without a loss"


def _cell(value: float) -> str:
    if isinstance(value, int):
        return f"{value:,}"
    return "none" if np.isnan(value) else f"{value:.4g}"


def _indices(selection: Any, size: int) -> Tensor:
    """The indices that a slice, a sequence of indices or a mask selects, (n,) int64, in [0, N)."""
    if isinstance(selection, slice):
        return torch.tensor(range(*selection.indices(size)), dtype=torch.long)
    if hasattr(selection, "sort_index") and np.asarray(selection).dtype.kind == "b":
        # A mask of pandas, perhaps of a frame that was sorted: its index says whose each value is.
        selection = selection.sort_index()
        if list(selection.index) != list(range(size)):
            raise IndexError(f"a mask of pandas needs an index of 0 to {size - 1}, one a sample")
    is_array = hasattr(selection, "__array__")  # of NumPy, PyTorch or pandas
    if not (is_array or isinstance(selection, Sequence)) or isinstance(selection, str):
        raise _no_index(selection)
    array = np.asarray(selection)
    if array.ndim != 1 or (array.size and array.dtype.kind not in "biu"):
        raise _no_index(selection)
    if array.dtype == bool:
        if len(array) != size:
            raise IndexError(f"a mask needs {size} booleans, one for each sample, got {len(array)}")
        return torch.from_numpy(array.nonzero()[0])
    places = torch.from_numpy(array.astype(np.int64))
    outside = (places < -size) | (places >= size)
    if outside.any():
        raise no_such_row(int(places[outside][0]), size)
    return places % size


def _token_places(counts: Tensor, indices: Tensor) -> Tensor:
    """Where the token losses of some samples lie, sample after sample."""
    starts, lengths = offsets_of(counts)[:-1][indices], counts[indices]
    within = torch.arange(int(lengths.sum())) - offsets_of(lengths)[:-1].repeat_interleave(lengths)
    return starts.repeat_interleave(lengths) + within


def _metadata_of_part(metadata: Mapping[str, Any], indices: Tensor) -> dict[str, Any]:
    """The metadata of a part: no data set has its identity, and its rows are not known any more."""
    part = {**metadata, "plan": {}}
    if "identity" in metadata:
        identity = metadata["identity"]
        digest = hashlib.sha256(indices.numpy().tobytes()).hexdigest()
        name = f"{PART_PREFIX}{digest[:16]} of {identity.get('dataset', '')}"
        part["identity"] = {**identity, "dataset": name, "num_samples": len(indices)}
    details = metadata.get("details", {})
    if isinstance(details.get("data"), Mapping):
        part["details"] = {name: value for name, value in details.items() if name != "data"}
    skipped = metadata.get("skipped", {})
    reasons = [(place, skipped.get(str(index))) for place, index in enumerate(indices.tolist())]
    part["skipped"] = {str(place): reason for place, reason in reasons if reason is not None}
    return part


def _no_index(index: Any) -> TypeError:
    hint = ""
    if isinstance(index, str):
        attribute = {"loss": "losses", "count": "counts"}.get(index, f"columns[{index!r}]")
        hint = f"; values of all samples are scores.{attribute}"
    return TypeError(
        "scores are indexed by an integer, a slice, a list of integers or a mask of booleans, got "
        f"{index!r}{hint}"
    )
