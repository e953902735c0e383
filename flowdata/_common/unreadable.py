"""Reading samples of a data set that may raise on some of them.

An `Unreadable` can take the place of a sample that can't be read, so that the samples around it are
scored all the same. `Readable` puts it there, and `CollateReadable` leaves it out of the batch.
"""

from __future__ import annotations

from collections.abc import Callable, MutableMapping, Sequence
from contextlib import suppress
from copy import copy
from dataclasses import dataclass
from typing import Any

from torch.utils.data import Dataset

from flowdata.errors import SampleError


@dataclass(frozen=True)
class Unreadable:
    """The stand-in for a sample that can't be read.

    Attributes:
        reason: the exception that the data set raised, in words.
    """

    reason: str


class Readable(Dataset[Any]):
    """A map-style data set with a remedy for samples that raise, or are None.

    Args:
        dataset: the data set to read; the wrapper passes its other attributes on.
        skip: True gives an `Unreadable` for such a sample; False raises a `SampleError` that names
            its index.
    """

    def __init__(self, dataset: Any, *, skip: bool) -> None:
        self.dataset, self.skip = dataset, skip

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        try:
            sample = self.dataset[index]
        except Exception as error:
            return self._unreadable(index, f"{type(error).__name__}: {error}", error)
        return self._unreadable(index, "is None") if sample is None else sample

    def _unreadable(self, index: int, reason: str, error: Exception | None = None) -> Unreadable:
        if self.skip:
            return Unreadable(reason)
        verb = "" if error is None else "raised "
        raise SampleError(
            f"dataset[{index}] {verb}{reason}; mend or remove that sample, or pass "
            "on_error='skip' to leave such samples without a loss"
        ) from error

    def __getitems__(self, indices: Sequence[int]) -> list[Any]:
        """Return several samples, read at once where the data set can."""
        if hasattr(self.dataset, "__getitems__"):
            try:
                samples: list[Any] = self.dataset.__getitems__(list(indices))
                if all(sample is not None for sample in samples):
                    return samples
            except Exception:
                pass  # read one by one, they show which of them raises
        return [self[index] for index in indices]

    def __getattr__(self, name: str) -> Any:
        # Pickle looks for special methods before `dataset` is set. A look-up in `self.dataset`
        # would then call this method again, without end.
        if name == "dataset" or name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.dataset, name)


def first_readable(dataset: Any) -> Any:
    """Return the first sample that can be read.

    Args:
        dataset: not empty; gives an `Unreadable` for each sample that can't be read.

    Raises:
        SampleError: no sample can be read.
    """
    for index in range(len(dataset)):
        sample = dataset[index]
        if not isinstance(sample, Unreadable):
            return sample
    raise SampleError(f"none of the data set's {len(dataset)} samples can be read: {sample.reason}")


class CollateReadable:
    """A collate function that leaves out every `Unreadable`.

    It is given copies of mappings and lists: some collate functions take fields out of theirs, and
    a sample is collated more than once.

    Args:
        collate: the collate function for the samples themselves.
    """

    def __init__(self, collate: Callable[[list[Any]], Any]) -> None:
        self.collate = collate

    def __call__(self, samples: Sequence[Any]) -> Any:
        return self.collate([_copied(each) for each in samples if not isinstance(each, Unreadable)])


def _copied(sample: Any) -> Any:
    return copy(sample) if isinstance(sample, MutableMapping | list) else sample


def some_readable(dataset: Any, most: int) -> list[Any]:
    """Return samples that can be read, from all over a data set: it may be sorted in some way."""
    samples = []
    size = min(most, len(dataset))
    for index in (place * (len(dataset) - 1) // max(1, size - 1) for place in range(size)):
        with suppress(SampleError):  # the run will meet it and say so
            samples.append(dataset[index])
    readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
    return readable or [first_readable(dataset)]
