"""Arrays that grow: in memory while they are small, and in a temporary file beyond that.

The file has no name and goes with the array. The finished array is a view of it, so that the
system holds in memory what is read of it, and gives that memory back where it is needed.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from tempfile import TemporaryFile
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from flowdata._common import large_array


class GrowingArray:
    """Numbers that are added one after another.

    Args:
        code: of their type, as the module `array` has them: ``"i"`` for int32, ``"q"`` for int64,
            ``"b"`` for int8.
    """

    def __init__(self, code: str) -> None:
        self._latest = array(code)
        self._file: IO[bytes] | None = None
        self._in_file = 0

    def __len__(self) -> int:
        return self._in_file + len(self._latest)

    def extend(self, numbers: Iterable[int]) -> None:
        """Add numbers."""
        self._latest.extend(numbers)
        if len(self._latest) * self._latest.itemsize > large_array.IN_MEMORY:
            self._write()

    def _write(self) -> None:
        if self._file is None:
            self._file = TemporaryFile()  # noqa: SIM115, the finished array needs it open
        self._latest.tofile(self._file)
        self._in_file += len(self._latest)
        del self._latest[:]

    def finish(self) -> NDArray[Any]:
        """Return the numbers, (N,); none can be added after."""
        dtype = np.dtype(f"i{self._latest.itemsize}")
        if self._file is None:
            return np.asarray(self._latest, dtype)
        self._write()
        self._file.flush()
        return np.memmap(self._file, dtype, mode="r")
