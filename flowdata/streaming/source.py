"""One process's share of a stream, read window by window and resumed at any window.

The stream deals its samples out in turn. Of two ranks with two workers each::

    sample   0  1  2  3  4  5  6  7  …
    share    0  1  2  3  0  1  2  3
    rank     0  0  1  1  0  0  1  1
    worker   0  1  0  1  0  1  0  1     within the rank
"""

from __future__ import annotations

import copy
import hashlib
import inspect
import sys
import weakref
from collections.abc import Callable, Iterator, Mapping
from itertools import islice
from typing import Any

from torch.utils.data import DataLoader, IterableDataset, get_worker_info

from flowdata._common.data_sets import is_map_style
from flowdata._common.notices import logger
from flowdata.store.fingerprint.values import NoContentError, update_digest

_SAMPLES_IN_MARK = 4  # a buffer that is filled anew hardly ever gives the same four again


class StreamSource:
    """This process's share of a stream's samples, from the current window on.

    A map-style data set is read by index. Another one resumes by its own `state_dict` where it has
    one. Without one it is read again from its start, and the samples before the current window are
    skipped.

    Args:
        dataset: any iterable, a map-style data set, a Hugging Face stream, or a torchdata node.
        rank: this rank's number among those that share the samples.
        num_replicas: the number of these ranks.
    """

    def __init__(self, dataset: Any, rank: int, num_replicas: int) -> None:
        # A node by itself can't be saved and resumed as a loader of nodes can.
        nodes = _nodes()
        is_node = nodes is not None and isinstance(dataset, nodes.BaseNode)
        options = {"restart_on_stop_iteration": False}
        self.dataset = nodes.Loader(dataset, **options) if is_node else dataset
        self.rank, self.num_replicas = rank, num_replicas
        self.position = 0  # samples of this process before the current window
        self._state: Any = None  # the dataset's, at the start of the current window
        self._mark: str | None = None  # a digest of the current window's samples
        self._is_stateful = _is_stateful(self.dataset)
        self._fresh_state: Any = None  # the dataset's, before anything was read
        self._last_iterator: Callable[[], Any] = _nothing  # of the dataset, in the pass before
        self._has_given = False  # a sample, in an earlier pass
        self._is_used_up = False  # the last pass went to the dataset's end

    def __getstate__(self) -> dict[str, Any]:
        # No iterator goes along to a worker, which begins with one of its own.
        return {**self.__dict__, "_last_iterator": _nothing}

    def share(self) -> tuple[int, int]:
        """Return the number of this process's share, and the number of shares."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return self.rank * workers + number, self.num_replicas * workers

    def windows(self, size: int) -> Iterator[list[Any]]:
        """Yield this process's samples from the current window on, `size` at a time.

        Raises:
            ValueError: the dataset can be read only once, and has been.
        """
        is_whole = self.position == 0
        samples = self._samples()
        self._is_used_up = False
        while window := list(islice(samples, size)):
            self._has_given = True
            self._meet_mark(window)
            yield window
        self._is_used_up = True
        self._meet_mark([])
        if is_whole and self.position == 0 and self._has_given:
            raise self._read_once()

    def advance(self, count: int) -> None:
        """Let the current window begin where the dataset now stands, `count` samples later."""
        self.position += count
        # A copy, since some datasets return the very object that they go on writing to.
        self._state = copy.deepcopy(self.dataset.state_dict()) if self._is_stateful else None
        self._mark = None

    def rewind(self) -> None:
        """Let the next pass begin at the start of the source."""
        self.position, self._state, self._mark = 0, None, None

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the dataset, and of what a loader reads, where they have epochs."""
        parts = [self.dataset]
        if _is_loader(self.dataset):
            parts = [self.dataset.root]
        elif isinstance(self.dataset, DataLoader):
            parts += [self.dataset.dataset, self.dataset.sampler]
        for part in parts:
            if hasattr(part, "set_epoch"):
                part.set_epoch(epoch)

    def state_dict(self) -> dict[str, Any]:
        """Return where the current window begins: plain data."""
        return {"source": self._state, "read": self.position, "mark": self._mark}

    def check_state(self, state_dict: Mapping[str, Any]) -> None:
        """Raise ValueError if a state leads the dataset by a state of its own, but it takes none.

        Args:
            state_dict: as `state_dict` returns it.
        """
        if state_dict["source"] is not None and not self._is_stateful:
            raise ValueError(
                "state_dict holds a state of the stream's source, but this stream's source, "
                f"{type(self.dataset).__name__}, has no load_state_dict: it was saved over "
                "another source. Build this stream over the same one, or start anew"
            )

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Let the next pass begin where a state says."""
        self._state, self.position = state_dict["source"], state_dict["read"]
        self._mark = state_dict.get("mark")

    def _samples(self) -> Iterator[Any]:
        """This process's samples from the start of the current window on."""
        share, shares = self.share()
        if is_map_style(self.dataset):
            places = range(share + shares * self.position, len(self.dataset), shares)
            return (self.dataset[place] for place in places)
        if isinstance(self.dataset, IterableDataset):
            # PyTorch asks such a dataset to split itself between workers, so that here the samples
            # are dealt out to ranks alone.
            share, shares = self.rank, self.num_replicas
        if self._state is None:
            return islice(self._begin_anew(), share + shares * self.position, None, shares)
        self._keep_fresh_state()
        # The state was saved right after a sample of this share. One sample of each other share
        # follows before the next one of this.
        return islice(self._go_on(), shares - 1, None, shares)

    def _go_on(self) -> Iterator[Any]:
        """The dataset's samples from its state on.

        Raises:
            ValueError: the dataset can't take up the state.
        """
        try:
            self.dataset.load_state_dict(copy.deepcopy(self._state))
            samples = iter(self.dataset)
            first = list(islice(samples, 1))  # many a dataset takes up its state only now
        except (LookupError, TypeError, AttributeError, ValueError) as error:
            raise ValueError(
                f"the stream's source, {type(self.dataset).__name__}, can't go on from the state "
                f"that it gave ({type(error).__name__}: {error}). A shuffled Hugging Face stream "
                "can't where several workers read it: shuffle the data set before it becomes a "
                "stream, use one worker, or resume between epochs"
            ) from error
        yield from first
        yield from samples

    def _begin_anew(self) -> Iterator[Any]:
        """The dataset's own iterator, from its first sample on."""
        if self._fresh_state:
            # Many a stream, Hugging Face's among them, begins every pass where the last one
            # stopped or was resumed.
            self.dataset.load_state_dict(copy.deepcopy(self._fresh_state))
            self._last_iterator = _nothing  # it may well be the same
        self._keep_fresh_state()
        last = self._last_iterator()
        attributes = dict(getattr(last, "__dict__", {}))
        iterator: Iterator[Any] = iter(self.dataset)
        if self._has_given and not self._is_used_up:
            # A generator, or an iterator that only returns itself, would go on in the middle. One
            # that begins again changes something of its own in doing so.
            now = getattr(last, "__dict__", {})
            is_same = all(now.get(name) is value for name, value in attributes.items())
            if (iterator is last and is_same) or _reads_generator(self.dataset):
                raise self._read_once()
        self._last_iterator = _reference(iterator)
        return iterator

    def _read_once(self) -> ValueError:
        return ValueError(
            f"dataset can be read only once, and has been: {type(self.dataset).__name__} does not "
            "begin again; pass an object whose __iter__ returns a new iterator, or build a new "
            "stream for every pass"
        )

    def _keep_fresh_state(self) -> None:
        """Keep the state that the dataset has before anything is read, which leads to its start.

        What begins at its start of its own accord needs none: a loader of nodes, and one whose
        workers are started anew, which would be started to be asked.
        """
        begins_anew = _is_loader(self.dataset) or (
            isinstance(self.dataset, DataLoader)
            and self.dataset.num_workers > 0
            and not self.dataset.persistent_workers
        )
        if self._is_stateful and not begins_anew and self._fresh_state is None:
            self._fresh_state = copy.deepcopy(self.dataset.state_dict())

    def _meet_mark(self, window: list[Any]) -> None:
        """Say so if a resumed window holds other samples than when its state was saved."""
        mark = _mark_of(window)
        if self._mark is not None and mark is not None and mark != self._mark:
            logger.warning(
                "the stream's source does not go on where it stood: after %d samples it gives "
                "others than when the state was saved. If it shuffles (a Hugging Face "
                ".shuffle() has a buffer that no state holds; other shuffles may have no seed), "
                "some samples are now left out and others come twice: shuffle the data set before "
                "it becomes a stream, or resume between epochs. Random augmentation alone leaves "
                "nothing out",
                self.position,
            )
        self._mark = mark if window else None


def _nothing() -> None:
    """The reference to no iterator; a function, since a worker is sent it by name."""


def _reference(iterator: Any) -> Callable[[], Any]:
    """A reference that lets a generator end, and its files close, when nobody reads it."""
    try:
        return weakref.ref(iterator)
    except TypeError:  # of a plain list, say, which has nothing to close
        return lambda: iterator


def _nodes() -> Any:
    """torchdata's nodes; None where nobody has imported them, so that no dataset is one."""
    return sys.modules.get("torchdata.nodes")


def _is_loader(dataset: Any) -> bool:
    """Whether a dataset is torchdata's loader of nodes."""
    nodes = _nodes()
    return nodes is not None and isinstance(dataset, nodes.Loader)


def _reads_generator(dataset: Any) -> bool:
    """Whether at the beginning of a chain of torchdata's nodes stands a generator, or the like."""
    node: Any = dataset.root if _is_loader(dataset) else None
    while hasattr(node, "source"):
        node = node.source
    leaf = getattr(node, "iterable", None)
    return isinstance(leaf, Iterator) and not hasattr(leaf, "__dict__")


def _is_stateful(dataset: Any) -> bool:
    """Whether a dataset says where it stands, without being told, and can be led back there."""
    if not callable(getattr(dataset, "load_state_dict", None)):
        return False
    try:
        inspect.signature(dataset.state_dict).bind()
    except (AttributeError, TypeError):
        return False
    return True


def _mark_of(window: list[Any]) -> str | None:
    """A digest of a few samples, by which the window is known again; None where they have none."""
    digest = hashlib.sha256(str(len(window)).encode())
    last = len(window) - 1
    places = sorted({last * number // (_SAMPLES_IN_MARK - 1) for number in range(_SAMPLES_IN_MARK)})
    try:
        for place in places if window else []:
            update_digest(digest, window[place])
    except NoContentError:
        return None
    return digest.hexdigest()
