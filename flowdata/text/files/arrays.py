"""The items of a JSON array, one after another: none but the present one is in memory."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator
from typing import Any, TextIO

_BEGINS = re.compile(r"\s*\[\s*[{\]]")
_MAY_BEGIN = re.compile(r"\s*(\[\s*)?")
_SPACES = re.compile(r"\s*")
_AT_ONCE = 2**16  # characters that are read of a file


def begin_of(text: TextIO) -> str:
    """Return the first characters of a file, enough of them for `is_array`."""
    begin = ""
    while _MAY_BEGIN.fullmatch(begin) and (more := text.read(_AT_ONCE)):
        begin += more
    return begin


def is_array(begin: str) -> bool:
    """Return whether a file that begins so is an array, of objects if it holds anything.

    Example:
        >>> is_array('[ {"a": 1},'), is_array('["a", "b"]'), is_array('{"a": 1}')
        (True, False, False)
    """
    return _BEGINS.match(begin) is not None


def read_array(begin: str, text: TextIO) -> Iterator[tuple[Any, str]]:
    """Yield the items of an array, each with the characters that it was read from.

    Args:
        begin: what was read of it already.
        text: the rest.

    Raises:
        ValueError: it is no JSON; the line is named.
    """
    items = _Items(begin, text)
    items.place = begin.index("[") + 1
    while items.sign() != "]":
        yield items.next()
        sign = items.sign()
        if sign == ",":
            items.place += 1
            if items.sign() == "]":
                raise items.error("a comma stands before the closing bracket")
        elif sign != "]":
            raise items.error("a comma is missing, or the closing bracket")
    items.place += 1
    if items.sign():
        raise items.error("something follows the array")


class _Items:
    """Reads values from a text, part by part."""

    def __init__(self, begin: str, text: TextIO) -> None:
        self._part, self._text, self._line = begin, text, 1
        self._decoder = json.JSONDecoder()
        self.place = 0

    def next(self) -> tuple[Any, str]:
        """The value at the present place, and its characters."""
        self.sign()
        while True:
            try:
                value, end = self._decoder.raw_decode(self._part, self.place)
            except json.JSONDecodeError as error:
                if self._read_on():  # it may only have been cut
                    continue
                self.place = error.pos
                raise self.error(error.msg) from None
            if end < len(self._part) or not self._read_on():
                characters = self._part[self.place : end]
                self.place = end
                return value, characters

    def sign(self) -> str:
        """The next character that is no space, which the place is moved to; "" at the end."""
        while True:
            match = _SPACES.match(self._part, self.place)
            self.place = self.place if match is None else match.end()
            if self.place < len(self._part) or not self._read_on():
                return self._part[self.place : self.place + 1]

    def error(self, reason: str) -> ValueError:
        """What to raise about the present place."""
        return ValueError(f"line {self._line_at(self.place)}: not JSON ({reason})")

    def _line_at(self, place: int) -> int:
        return self._line + self._part.count("\n", 0, place)

    def _read_on(self) -> bool:
        """Read as much again as is held, so that a long value is not tried too often."""
        more = self._text.read(max(_AT_ONCE, len(self._part) - self.place))
        if more:
            self._line = self._line_at(self.place)
            self._part, self.place = self._part[self.place :] + more, 0
        return bool(more)
