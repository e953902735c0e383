"""A data set read once more, checked against its scores, and written with its weights."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from flowdata._common.unreadable import Unreadable
from flowdata.errors import ScoreMismatchError
from flowdata.scores import Scores
from flowdata.scores.matching import rows_difference, rows_identity
from flowdata.store.fingerprint.rows import RowsDigest
from flowdata.text.conversation import Row
from flowdata.text.files.tables import TableStream
from flowdata.text.files.writing import (
    is_lines,
    to_dataset,
    with_columns,
    write_dataset,
    write_lines,
)
from flowdata.text.read import read_rows
from flowdata.text.weighted_rows import RowWeights


class Weighing:
    """Writes the rows that were scored, each with its weight, and counts them.

    Args:
        scores: of the rows, with their identity.
        weights: what each row gets.
        drop: leave rows without a loss out.

    Attributes:
        rows: how many were read.
        written: how many of them were written.
        without_loss: rows that have none; `first_without_loss` is the index of the first, and
            `first_reason` why it could not be read, if it could not.
        no_rows: lines of a file that are no rows, which can't be written; `first_no_row` is why.
    """

    def __init__(self, scores: Scores, weights: RowWeights, *, drop: bool) -> None:
        self.scores, self.weights, self.drop = scores, weights, drop
        self.rows = self.written = self.without_loss = self.no_rows = 0
        self.first_without_loss, self.first_reason, self.first_no_row = -1, "", ""

    def write(self, source: str, where: Mapping[str, Any], output: Path) -> None:
        """Read the rows of a source and write them; nothing is written where they are others.

        Args:
            source: as in `read_rows`.
            where: its options.
            output: a path that `check_output` let pass.

        Raises:
            ScoreMismatchError: the rows are not those that were scored.
            ValueError: a row has a column by a new one's name, or can't be written.
        """
        try:
            rows = read_rows(source, streaming=is_lines(output), on_error="skip", **where)
        except FileNotFoundError as error:
            raise FileNotFoundError(f"{error}; --data says where the data is now") from None
        # A table's own data set has its rows as they are in the file, with every null.
        table = rows if isinstance(rows, TableStream) else None
        rows = rows if table is None else table.dataset
        pairs = self._checked(rows, source, table)
        if is_lines(output):
            write_lines(({**row, **values} for _, row, values in pairs), output)
        elif isinstance(rows, list):
            write_dataset(to_dataset([{**row, **values} for _, row, values in pairs]), output)
        else:
            values = {index: value for index, _, value in pairs}  # of the rows that are written
            write_dataset(with_columns(rows.select(values), list(values.values())), output)

    def figures(self) -> dict[str, Any]:
        """Return what was written, by name."""
        name = self.weights.options.name
        weights = [weight for weight in self.weights.columns[name] if weight is not None]
        figures: dict[str, Any] = {
            "rows": self.rows,
            "written": self.written,
            "without_loss": self.without_loss,
            "mean_weight": sum(weights) / len(weights),
        }
        if "keep" in self.weights.columns:
            figures["keep"] = sum(keep is True for keep in self.weights.columns["keep"])
        return figures

    def _checked(
        self, rows: Any, source: str, table: TableStream | None
    ) -> Iterator[tuple[int, Row, dict[str, Any]]]:
        """The index, the row and what it gets; raises once it is clear that the rows are others."""
        identity = rows_identity(self.scores.metadata) or {}
        digest = RowsDigest(identity["columns"])
        for index, row in enumerate(digest.watch(rows)):
            if index >= len(self.scores):
                raise _changed(source, f"it has more than the {len(self.scores):,} rows scored")
            self.rows += 1
            if isinstance(row, Unreadable):
                self.no_rows += 1
                self.first_no_row = self.first_no_row or row.reason
                continue
            if self.scores.losses[index].isnan():
                self._count_missing(index)
                if self.drop:
                    continue
            self.written += 1
            # It gets its weights as it was scored: Arrow's nulls are no part of its messages.
            as_scored = row if table is None else table.without_nulls(row)
            yield index, row, self.weights.values_of(index, as_scored)
        if self.rows < len(self.scores):
            raise _changed(source, f"it has {self.rows:,} rows, {len(self.scores):,} were scored")
        difference = rows_difference(identity, digest.identity())
        if difference:
            raise _changed(source, difference)

    def _count_missing(self, index: int) -> None:
        if not self.without_loss:
            self.first_without_loss = index
            self.first_reason = self.scores.metadata.get("skipped", {}).get(str(index), "")
        self.without_loss += 1


def _changed(source: str, difference: str) -> ScoreMismatchError:
    return ScoreMismatchError(
        f"{source} is not what was scored: {difference}. Nothing was written; score it again (rows "
        "added at its end are scored alone), or name the file that was scored with --data"
    )
