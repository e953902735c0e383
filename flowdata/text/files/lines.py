"""Files of lines: JSON, CSV and text, compressed or not, as rows exactly as they are written.

Arrow and pandas, through which `datasets` reads such files, guess types: a reply "2020-01-01"
becomes a time, "NA" and "None" are missing, "007" is 7, and a column that first appears late in
the file is an error. So these three kinds are read by Python's own modules, one row at a time.
"""

from __future__ import annotations

import bz2
import codecs
import csv
import gzip
import io
import json
import lzma
import re
import sys
import zlib
from collections.abc import Iterable, Iterator
from itertools import chain, islice
from pathlib import Path
from typing import IO, Any, TextIO, cast

from flowdata._common.excerpts import FROM_0
from flowdata._common.unreadable import Unreadable
from flowdata.text.conversation import LEFT_OUT, Row
from flowdata.text.files.arrays import begin_of, is_array, read_array
from flowdata.text.files.places import kind_of, rows_below

_EXCELS_MARK = re.compile(r"sep=(.)\s*")  # a first line that tells Excel the delimiter
_BEGINNING = 16  # bytes of a file, by which its encoding is told
_MARKS = {".gz": b"\x1f\x8b", ".xz": b"\xfd7zXZ", ".zst": b"\x28\xb5\x2f\xfd"}
_DELIMITERS = (",", ";", "\t", "|")


class LineFiles:
    """The rows of files, read anew by each pass over them: none is kept.

    Args:
        files: JSON, CSV or text files.
        encoding: theirs; a byte order mark is left out.
        limit: how many rows are given, from the first; None gives all.
        skip: True gives an `Unreadable` for a line that is no row; False raises a ValueError that
            names the file and the line.
    """

    def __init__(
        self,
        files: list[Path],
        *,
        encoding: str = "utf-8",
        limit: int | None = None,
        skip: bool = False,
    ) -> None:
        self.files, self.limit, self.skip = files, limit, skip
        try:
            name = codecs.lookup(encoding).name
        except LookupError:
            raise ValueError(f"encoding must be one that Python knows, got {encoding!r}") from None
        self.encoding = "utf-8-sig" if name == "utf-8" else name

    def __iter__(self) -> Iterator[Row | Unreadable]:
        return islice(chain.from_iterable(map(self._rows_of, self.files)), self.limit)

    def is_read_whole(self, file: Path) -> bool:
        """Return whether a file is one JSON object: neither lines nor an array."""
        if kind_of(file) != "json":
            return False
        with _open(file) as stream:
            text = io.TextIOWrapper(stream, encoding=self.encoding, errors="replace")
            begin = begin_of(text)
            if not begin.lstrip().startswith("{"):
                return False
            return not _is_row_alone(_first_line(_lines(begin, text))[1])

    def _rows_of(self, file: Path) -> Iterator[Row | Unreadable]:
        rows = {"json": _json_rows, "csv": _csv_rows, "text": _text_rows}[str(kind_of(file))]
        with _open(file) as stream:
            # Bytes that are no text are kept apart where the rows that hold them are to be skipped.
            errors = "surrogateescape" if self.skip else "strict"
            text = io.TextIOWrapper(stream, encoding=self.encoding, errors=errors, newline="")
            try:
                _refuse_compressed(file, stream)
                if likely := self._likely_encoding(stream):
                    raise ValueError(
                        f"{file}, line 1: every other byte is 0; name its encoding "
                        f"(--encoding {likely})"
                    )
                for number, row in enumerate(rows(text, file)):
                    if isinstance(row, Unreadable):
                        if not self.skip:
                            raise ValueError(row.reason + LEFT_OUT)
                    elif self.skip and _is_no_text(row):
                        reason = f"{file}, row {number}: holds bytes that are no text; {FROM_0}"
                        row = Unreadable(reason)
                    yield row
            except UnicodeDecodeError as error:
                raise ValueError(self._wrong_encoding(file, error)) from None
            except (EOFError, OSError, lzma.LZMAError, zlib.error) as error:
                raise ValueError(f"{file} can't be read to its end: {error}") from None

    def _likely_encoding(self, stream: IO[bytes]) -> str | None:
        """The encoding of text in pairs of bytes without a mark, which reads as UTF-8, too."""
        begin = _begin_of(stream)
        halves = {"utf-16-be": begin[::2], "utf-16-le": begin[1::2]}
        if self.encoding != "utf-8-sig" or len(begin) < 2:
            return None
        return next((name for name, half in halves.items() if not any(half)), None)

    def _wrong_encoding(self, file: Path, error: UnicodeDecodeError) -> str:
        """What to say of bytes that are no text in the encoding: where they are."""
        number = 1
        with _open(file) as stream:
            for line in stream:
                try:
                    line.decode(self.encoding)
                except UnicodeDecodeError as of_line:
                    error = of_line
                    break
                number += 1
        byte = error.object[error.start]
        likely = "utf-16" if number == 1 and error.start == 0 and byte in (0xFE, 0xFF) else "cp1252"
        return (
            f"{file}, line {number}: not {error.encoding} (byte 0x{byte:02x}, number "
            f"{error.start + 1} of the line); save the file as UTF-8, or name its encoding "
            f"(--encoding {likely})"
        )


def _begin_of(stream: IO[bytes]) -> bytes:
    return cast(io.BufferedReader, stream).peek(_BEGINNING)[:_BEGINNING]


def _refuse_compressed(file: Path, stream: IO[bytes]) -> None:
    """Raise ValueError for a compressed file whose name does not say so."""
    begin = _begin_of(stream)
    ending = next((name for name, mark in _MARKS.items() if begin.startswith(mark)), None)
    if ending is not None:
        raise ValueError(f"{file} is compressed; name it {file.name}{ending}")


def _is_no_text(row: Row) -> bool:
    """Whether a row holds characters that stand for no text: undecoded bytes, half a pair."""
    try:
        json.dumps(row, ensure_ascii=False).encode()
    except UnicodeEncodeError:
        return True
    return False


def _open(file: Path) -> IO[bytes]:
    """A file's bytes, decompressed."""
    suffix = file.suffix.lower()
    if suffix == ".gz":
        return cast(IO[bytes], gzip.open(file))
    if suffix == ".bz2":
        return cast(IO[bytes], bz2.open(file))
    if suffix == ".xz":
        return cast(IO[bytes], lzma.open(file))
    if suffix == ".zst":
        import pyarrow

        return cast(IO[bytes], io.BufferedReader(pyarrow.CompressedInputStream(str(file), "zstd")))
    return file.open("rb")


def _text_rows(text: TextIO, file: Path) -> Iterator[Row]:
    """A row for each line that holds something."""
    for line in text:
        if line.strip():
            yield {"text": line.rstrip("\r\n")}


def _csv_rows(text: TextIO, file: Path) -> Iterator[Row | Unreadable]:
    """The rows below a header; every cell is text, as it is written.

    A carriage return alone ends a line of an old Mac file, as it does the header. In other files it
    stands within a cell: pandas puts no quotes around such a cell.
    """
    csv.field_size_limit(sys.maxsize)
    number, header = _first_line(text)
    mark = _EXCELS_MARK.fullmatch(header)
    if mark is not None:
        lines, header = _first_line(text)
        number += lines
    is_tsv = ".tsv" in file.name.lower()
    delimiter = mark[1] if mark else "\t" if is_tsv else max(_DELIMITERS, key=header.count)
    last = ""  # character of what the reader has taken

    def taken() -> Iterator[str]:
        nonlocal last
        for each in chain([header], text):
            last = each[-1:]
            yield each

    reader = csv.reader(taken(), delimiter=delimiter, strict=True)
    line = number
    try:
        names = next(reader, [])
        is_mac = last == "\r"
        double = next((name for name in names if names.count(name) > 1), None)
        if double is not None:
            raise ValueError(f"{file}, line {number}: the header has {double!r} more than once")
        line = number + reader.line_num
        for cells in reader:
            if last == "\r" and not is_mac:
                while last == "\r" and next(reader, None) is not None:
                    pass  # what follows belongs to this row
                yield Unreadable(
                    f"{file}, line {line}: has a carriage return in a cell without quotes; a cell "
                    "with '\\r' in it needs quotes (pandas' to_csv: quoting=csv.QUOTE_ALL)"
                )
            elif len(cells) == len(names):
                yield dict(zip(names, cells, strict=True))
            elif cells:
                yield Unreadable(
                    f"{file}, line {line}: has {len(cells)} cells, where the header has "
                    f"{len(names)}; a cell with {delimiter!r} in it needs quotes"
                )
            line = number + reader.line_num
    except csv.Error as error:
        raise ValueError(f"{file}, line {line}: not CSV ({error})") from None


def _json_rows(text: TextIO, file: Path) -> Iterator[Row | Unreadable]:
    """The rows of JSON lines, of an array, or of an object that holds an array of rows."""
    begin = begin_of(text)
    if is_array(begin):
        try:
            for index, (row, content) in enumerate(read_array(begin, text)):
                halves = _may_hold_halves(content)
                yield _checked(row, _item(file, index), may_hold_halves=halves)
        except UnicodeError:
            raise
        except ValueError as error:
            raise ValueError(f"{file}, {error}") from None
        return
    lines = _lines(begin, text)
    number, line = _first_line(lines)
    if _is_row_alone(line) or not line.lstrip().startswith("{"):
        yield from _json_lines(chain([line], lines), file, number)
        return
    content = line + "".join(lines)
    try:
        whole = json.loads(content)
    except ValueError:
        yield from _json_lines(io.StringIO(content), file, number)
        return
    may_hold_halves = _may_hold_halves(content)
    for index, row in enumerate(rows_below(whole) or [whole]):
        yield _checked(row, _item(file, index), may_hold_halves=may_hold_halves)


def _item(file: Path, index: int) -> str:
    return f"{file}, item {index} (counted from 0)"


def _lines(begin: str, text: TextIO) -> Iterator[str]:
    """The lines of a file of which the beginning was read already."""
    return chain(io.StringIO(begin + text.readline(), newline=""), text)


def _is_row_alone(line: str) -> bool:
    """Whether the first line is a row: what follows are lines, too."""
    value = _parse(line)
    return isinstance(value, dict) and rows_below(value) is None


def _json_lines(lines: Iterable[str], file: Path, start: int) -> Iterator[Row | Unreadable]:
    for number, line in enumerate(lines, start):
        if not line.strip():
            continue
        try:
            row = json.loads(line.rstrip())
        except ValueError as error:
            yield Unreadable(f"{file}, line {number}: not JSON ({_what_is_wrong(error)})")
            continue
        yield _checked(row, f"{file}, line {number}", may_hold_halves=_may_hold_halves(line))


def _checked(row: Any, place: str, *, may_hold_halves: bool) -> Row | Unreadable:
    """A value as a row, if it is one."""
    if not isinstance(row, dict):
        return Unreadable(f"{place}: should be a JSON object, is {type(row).__name__}")
    if may_hold_halves and _is_no_text(row):
        return Unreadable(f"{place}: holds one half of a surrogate pair, which is no text")
    return row


def _may_hold_halves(content: str) -> bool:
    """Whether JSON escapes a surrogate; a tokenizer can't read one without its other half."""
    return "\\ud" in content or "\\uD" in content


def _parse(text: str) -> Any:
    try:
        return json.loads(text)
    except ValueError:
        return None


def _what_is_wrong(error: ValueError) -> str:
    """What a line that is no JSON has wrong; the line's own number in itself is always 1."""
    if isinstance(error, json.JSONDecodeError):
        return f"{error.msg}, column {error.colno}"
    return str(error)


def _first_line(text: Iterable[str]) -> tuple[int, str]:
    """The number of the first line that holds something, and that line; "" where none does."""
    lines = ((number, line) for number, line in enumerate(text, 1) if line.strip())
    return next(lines, (1, ""))
