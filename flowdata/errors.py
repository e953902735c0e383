"""Every exception of the library."""

from __future__ import annotations


class ScoreMismatchError(ValueError):
    """Scores or a store meet a model, data set or option that they were not made with."""


class StoreError(ValueError):
    """A folder or file that is no store, is unfinished, damaged or of another format."""


class SampleError(ValueError):
    """A data set raised an exception when one of its samples was read; the message names it."""


class OutOfRangeError(ValueError):
    """A target, or a token, is none that the model has; the message names its sample.

    Args:
        message: what the model has, and what came.
        field: ``"labels"``, whatever the batch calls its targets, or ``"input_ids"``.
        low: the smallest value that the model has.
        high: the largest.
    """

    def __init__(
        self, message: str, *, field: str = "labels", low: float = 0, high: float = 0
    ) -> None:
        super().__init__(message)
        self.field, self.low, self.high = field, low, high


class DisagreementError(ValueError):
    """A sample checked during a run has another loss alone; nothing made that way is used.

    Args:
        sample: its index in the data set.
        reason: both numbers.
    """

    def __init__(self, sample: int, reason: str) -> None:
        super().__init__(
            f"sample {sample}, scored alone, does not have the loss that it has among others: "
            f"{reason}. The way that was right for the samples checked before is not right for "
            "this one. The same call again checks it first and takes a slower way; losses made by "
            "the first one are scored again"
        )
        self.sample = sample

    def __reduce__(self) -> tuple[object, ...]:
        return type(self), (self.sample, ""), {"args": self.args}


class RankError(RuntimeError):
    """Another rank of the process group failed, so that this one stopped too."""
