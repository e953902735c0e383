"""What the copies of a stream in a loader's workers and the one in the main process share."""

from __future__ import annotations

from typing import Any

import torch

_EPOCH, _READ_BY_WORKERS, _LOADED_OUTSIDE = range(3)


class SharedMarks:
    """Three numbers in memory that all copies of a stream see, whether forked or spawned.

    A loader with persistent workers copies the stream once and never again. Whatever the main
    process then does to its own copy has to reach the others through this memory.
    """

    def __init__(self) -> None:
        self._values = torch.zeros(3, dtype=torch.int64).share_memory_()
        self._last_epoch = 0  # that this process has heard of

    def __setstate__(self, state: dict[str, Any]) -> None:
        self.__dict__.update(state)
        self._values.share_memory_()  # memory of its own, where a stream was copied or read

    def announce_epoch(self, epoch: int) -> None:
        """Tell all copies the epoch of the passes that begin from now on."""
        self._last_epoch = epoch
        self._values[_EPOCH] = (epoch + 2**63) % 2**64 - 2**63  # torch's integers have a sign

    def new_epoch(self) -> int | None:
        """Return the epoch that another process has announced since the last call, or None."""
        epoch = int(self._values[_EPOCH]) % 2**64
        is_new = epoch != self._last_epoch
        self._last_epoch = epoch
        return epoch if is_new else None

    @property
    def read_by_workers(self) -> bool:
        """Whether the last pass began in a loader's worker."""
        return bool(self._values[_READ_BY_WORKERS])

    @read_by_workers.setter
    def read_by_workers(self, value: bool) -> None:
        self._values[_READ_BY_WORKERS] = value

    @property
    def loaded_outside(self) -> bool:
        """Whether the main process has loaded a state and not begun a pass from it."""
        return bool(self._values[_LOADED_OUTSIDE])

    @loaded_outside.setter
    def loaded_outside(self, value: bool) -> None:
        self._values[_LOADED_OUTSIDE] = value
