"""One process's share of a stream, read window by window and resumed at any window.

The stream deals its samples out in turn. Of two ranks with two workers each::

    sample   0  1  2  3  4  5  6  7  …
    share    0  1  2  3  0  1  2  3
    rank     0  0  1  1  0  0  1  1
    worker   0  1  0  1  0  1  0  1     within the rank
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import IterableDataset, get_worker_info


class StreamSource:
    """This process's share of a stream's samples, from the current window on.

    The dataset resumes by its own `state_dict` where it has one. Without one it is read again from
    its start, and the samples before the current window are skipped.

    Args:
        dataset: any iterable, a Hugging Face stream, or a torchdata node.
        rank: this rank's number among those that share the samples.
        num_replicas: the number of these ranks.
    """

    def __init__(self, dataset: Any, rank: int, num_replicas: int) -> None:
        self.dataset = _as_iterable(dataset)
        self.rank, self.num_replicas = rank, num_replicas
        self.position = 0  # samples of this process before the current window
        self._state: Any = None  # the dataset's, at the start of the current window
        self._fresh_state: Any = None  # a Hugging Face stream's, before anything was read

    def share(self) -> tuple[int, int]:
        """Return the number of this process's share, and the number of shares."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + number, self.num_replicas * workers

    def samples(self) -> Iterator[Any]:
        """Return this process's samples from the start of the current window on."""
        share, shares = self.share()
        if isinstance(self.dataset, IterableDataset):
            # PyTorch asks such a dataset to split itself between workers, so that here the samples
            # are dealt out to ranks alone.
            share, shares = self.rank, self.num_replicas
        if type(self.dataset).__module__.startswith("datasets."):
            # A Hugging Face stream begins every pass where it was last resumed. For a pass from
            # the start it is resumed at the state that it had before anything was read.
            if self._fresh_state is None:
                self._fresh_state = self.dataset.state_dict()
            elif self._state is None:
                self.dataset.load_state_dict(self._fresh_state)
        if self._state is None:
            return islice(self.dataset, share + shares * self.position, None, shares)
        self.dataset.load_state_dict(self._state)
        # The state was saved right after a sample of this share. One sample of each other share
        # follows before the next one of this.
        return islice(self.dataset, shares - 1, None, shares)

    def advance(self, count: int) -> None:
        """Let the current window begin where the dataset now stands, `count` samples later."""
        self.position += count
        has_state = hasattr(self.dataset, "state_dict")
        self._state = self.dataset.state_dict() if has_state else None

    def rewind(self) -> None:
        """Let the next pass begin at the start of the source."""
        self.position, self._state = 0, None

    def state_dict(self) -> dict[str, Any]:
        """Return where the current window begins: plain data."""
        return {"source": self._state, "read": self.position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next pass begin where a state says."""
        self._state, self.position = state_dict["source"], state_dict["read"]


def _as_iterable(dataset: Any) -> Any:
    """The dataset itself, or for a torchdata node its Loader, which can be saved and resumed."""
    if hasattr(dataset, "get_state") and hasattr(dataset, "reset"):
        from torchdata.nodes import Loader

        return Loader(dataset, restart_on_stop_iteration=False)
    return dataset
