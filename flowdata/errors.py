"""Every exception of the library."""

from __future__ import annotations


class ScoreMismatchError(ValueError):
    """Scores or a store meet a model, data set or option that they were not made with."""


class StoreError(ValueError):
    """A folder or file that is no store, is unfinished, damaged or of another format."""


class SampleError(ValueError):
    """A data set raised an exception when one of its samples was read; the message names it."""


class RankError(RuntimeError):
    """Another rank of the process group failed, so that this one stopped too."""
