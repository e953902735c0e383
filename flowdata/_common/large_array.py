"""Arrays of a value for every sample: in memory while small, in a temporary file beyond that.

The file has no name and goes with the array. The system holds in memory what is used of it, and
gives that memory back where it is needed.
"""

from __future__ import annotations

from tempfile import TemporaryFile
from typing import Any

import numpy as np
from numpy.typing import DTypeLike, NDArray

IN_MEMORY = 16 * 2**20  # bytes of one array
_AT_ONCE = 2**20  # bytes


def large_array(length: int, dtype: DTypeLike) -> NDArray[Any]:
    """Return zeros of shape (length,).

    Raises:
        OSError: the folder for temporary files has no room.
    """
    num_bytes = length * np.dtype(dtype).itemsize
    if num_bytes <= IN_MEMORY:
        return np.zeros(length, dtype)
    with TemporaryFile() as file:
        # Every byte is written: where one has no room on the disk, using it later would end the
        # process.
        for start in range(0, num_bytes, _AT_ONCE):
            file.write(bytes(min(_AT_ONCE, num_bytes - start)))
        file.flush()
        return np.memmap(file, dtype, mode="r+", shape=(length,))
