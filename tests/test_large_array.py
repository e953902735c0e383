"""Arrays of a value for every sample, in memory or in a file."""

from functools import partial
from pathlib import Path

import numpy as np
import pytest

from flowdata._common import large_array as module
from flowdata._common.large_array import large_array


@pytest.mark.parametrize("in_memory", [0, 24, 2**20])
def test_an_array_holds_what_is_put_into_it(in_memory, monkeypatch):
    monkeypatch.setattr(module, "IN_MEMORY", in_memory)
    array = large_array(5, np.int64)
    assert isinstance(array, np.memmap) == (in_memory < 5 * 8)
    assert array.tolist() == [0] * 5
    array[[3, 1]] = 7, 8
    assert array.tolist() == [0, 8, 0, 7, 0]


def test_a_full_disk_is_an_error_before_the_array_is_used(monkeypatch):
    monkeypatch.setattr(module, "TemporaryFile", partial(Path.open, Path("/dev/full"), "w+b", 0))
    with pytest.raises(OSError, match="No space left"):
        large_array(2**24, np.float32)
