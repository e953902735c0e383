"""The identity of rows of text: which rows, in which order, whatever read them.

A file's rows come as they are written, or through Arrow, which gives every object the names of all
the others and null for their values, turns 0 beside 0.5 into 0.0, and knows no empty cell but null.
So what holds nothing does not count here, and numbers count as they would be printed.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from flowdata.store.fingerprint.values import canonical

_SCHEME = 1
_MODULUS = 1 << 128
_MOST_MARKS = 512  # of where the rows of two data sets part; each takes 8 characters


class RowsDigest:
    """The content of rows, taken while they pass by.

    Args:
        columns: the columns that count: all that would be read, whether rows have them or not.

    Example:
        >>> as_written, through_arrow = RowsDigest(["chat"]), RowsDigest(["chat"])
        >>> as_written.add({"chat": [{"role": "user", "weight": 0}], "id": 7})
        >>> through_arrow.add({"chat": [{"role": "user", "weight": 0.0, "name": None}]})
        >>> as_written.identity() == through_arrow.identity()
        True
    """

    def __init__(self, columns: Sequence[str]) -> None:
        self.columns = sorted(set(columns))
        self._digest = hashlib.sha256(canonical(self.columns))
        self._sum = self._count = 0
        self._held: set[str] = set()  # the columns that hold something in some row
        self._step = 1  # rows between two marks
        self._marks: list[str] = []  # the digest's beginning at each

    def __len__(self) -> int:
        """Return the number of rows so far."""
        return self._count

    def add(self, row: Mapping[str, Any] | None) -> None:
        """Take the next row; None stands for one that can't be read."""
        content = {} if row is None else {c: _content(row.get(c)) for c in self.columns}
        holding = {name: value for name, value in content.items() if value}
        self._held.update(holding)
        text = json.dumps(holding, sort_keys=True)
        digest = hashlib.sha256(text.encode()).digest()
        self._digest.update(digest)
        self._sum = (self._sum + int.from_bytes(digest[:16], "little")) % _MODULUS
        self._count += 1
        if self._count % self._step == 0:
            self._mark()

    def _mark(self) -> None:
        """Note the digest so far; where there are too many notes, every second one will do."""
        self._marks.append(self._digest.hexdigest()[:8])
        if len(self._marks) > _MOST_MARKS:
            self._step *= 2
            self._marks = self._marks[1::2]

    def watch(self, rows: Iterable[Any]) -> Iterator[Any]:
        """Pass rows on, and take each of them; what is no mapping stands for none."""
        for row in rows:
            self.add(row if isinstance(row, Mapping) else None)
            yield row

    def identity(self) -> dict[str, Any]:
        """Return the identity of the rows so far, JSON-like.

        It has `scheme`, `count`, `columns`, `held` (those that hold something in some row), `rows`
        (a digest of the rows in their order), `any_order` (one of the rows alone), and `marks`, the
        beginnings of the digest after every `step` rows (`first_difference`).
        """
        return {
            "scheme": _SCHEME,
            "count": self._count,
            "columns": self.columns,
            "held": sorted(self._held),
            "rows": self._digest.hexdigest(),
            "any_order": f"{self._sum:032x}",
            "step": self._step,
            "marks": "".join(self._marks),
        }


def first_difference(one: Mapping[str, Any], other: Mapping[str, Any]) -> tuple[int, int] | None:
    """Return the first and the last of the rows among which two data sets first differ.

    Up to 512 rows it is one row. None where the rows are the same as far as is known: identities of
    earlier versions have no marks.

    Args:
        one: an identity (`RowsDigest.identity`).
        other: another.

    Example:
        >>> one, other = RowsDigest(["text"]), RowsDigest(["text"])
        >>> for number in range(9):
        ...     one.add({"text": str(number)})
        ...     other.add({"text": str(number % 7)})
        >>> first_difference(one.identity(), other.identity())
        (7, 7)
    """
    if one["rows"] == other["rows"] or not ("marks" in one and "marks" in other):
        return None
    step, count = max(one["step"], other["step"]), min(one["count"], other["count"])
    pairs = zip(_marks_at(one, step), _marks_at(other, step), strict=False)
    same = next((i for i, (mark, its) in enumerate(pairs) if mark != its), count // step)
    return same * step, min((same + 1) * step, max(one["count"], other["count"])) - 1


def _marks_at(identity: Mapping[str, Any], step: int) -> list[str]:
    """The marks of an identity after every `step` rows, a multiple of its own."""
    every, marks = step // identity["step"], identity["marks"]
    return [marks[8 * i : 8 * i + 8] for i in range(every - 1, len(marks) // 8, every)]


def digest_tokens(
    input_ids: NDArray[np.int32], offsets: NDArray[np.int64], is_target: NDArray[np.bool_] | None
) -> str:
    """Return the hex SHA-256 of token samples.

    Args:
        input_ids: (Σ T,) int32, the tokens of all samples one after another.
        offsets: (N + 1,) int64, where each sample begins and the last one ends.
        is_target: (Σ T,) bool; None leaves the targets out.
    """
    digest = hashlib.sha256()
    for array in (input_ids, offsets) if is_target is None else (input_ids, is_target, offsets):
        digest.update(np.ascontiguousarray(array).data)  # as they lie in memory, without a copy
    return digest.hexdigest()


def _content(value: Any) -> Any:
    """A value as it counts: what holds nothing is left out of objects, numbers are text."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, Mapping):
        contents = ((str(name), _content(item)) for name, item in value.items())
        return {name: content for name, content in contents if content}
    if isinstance(value, list | tuple):
        return [_content(item) for item in value]
    if hasattr(value, "tolist"):  # of NumPy or PyTorch
        return _content(value.tolist())
    is_whole = isinstance(value, float) and value.is_integer()
    return str(int(value) if is_whole else value)
