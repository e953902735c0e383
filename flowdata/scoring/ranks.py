"""Ranks: the processes that share one call of `LossScorer.score`, and how they share it.

They talk through the key-value store that their process group was begun with, without
collectives until the last pack is scored: whoever is ready claims the next pack, so that slow
ranks get fewer, and a rank that waits notices when another one has failed, or is gone: all of them
show a sign of life every few seconds. The store lives where the group's launcher put it (torchrun's
agent, or rank 0); a claim is one round trip to it.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic, sleep
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import get_worker_info

from flowdata._common.notices import logger
from flowdata.errors import RankError

_SLOWEST = 0.2  # seconds between two looks at the store
_TELL_AFTER = 60.0  # seconds of waiting, then again after each doubling
_BEAT = 5.0  # seconds between two signs of life
_SILENT = 120.0  # seconds without one, after which a rank counts as gone
_LINGER = 5.0  # seconds for which a failed rank 0 waits for the others to hear of it
_STOP = 1 << 40  # more packs than there are
T = TypeVar("T")


class Ranks:
    """This process among those that share a call.

    Args:
        store: the `torch.distributed.Store` they talk through; a new one for each call.
        rank: this process's number.
        size: how many they are.
    """

    def __init__(self, store: Any, rank: int, size: int) -> None:
        self._store, self.rank, self.size = store, rank, size
        self.claimed = 0  # packs that all ranks together have claimed, when this one last did
        self._ahead = False
        self._holder: dict[int, int] = {}  # on whose list a pack is that this rank will run
        self._changes = itertools.count()

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads and writes for all."""
        return self.rank == 0

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an error in the block, or this process's death, reach all ranks that wait for it."""
        try:
            with self._alive():
                yield
        except dist.DistNetworkError as error:
            raise RankError(
                "stopped, because the process that the ranks talk through (rank 0, or torchrun) is "
                f"gone; its own output says why ({error})"
            ) from error
        except BaseException as error:
            with suppress(RuntimeError):  # should the store be gone, the others notice that
                if not isinstance(error, RankError):
                    self._store.set("error", f"rank {self.rank}: {type(error).__name__}: {error}")
                    self._store.add("claimed", _STOP)
                self._tell(f"left/{self.rank}", True)
                self._linger()
            raise

    def _linger(self) -> None:
        """Let rank 0, in whose process the store may live, stay until the others have heard."""
        deadline, others = monotonic() + _LINGER, range(1, self.size if self.is_first else 0)
        while monotonic() < deadline and not all(
            self._store.check([f"left/{rank}"]) for rank in others
        ):
            sleep(0.01)

    @contextmanager
    def _alive(self) -> Iterator[None]:
        """Show signs of life during the block."""
        if self.size == 1:
            yield
            return
        over = Event()
        thread = Thread(target=self._beat, args=(over,), name="flowdata signs of life", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()

    def _beat(self, over: Event) -> None:
        with suppress(RuntimeError):  # should the store be gone, the others notice that
            self._store.add(f"alive/{self.rank}", 1)
            while not over.wait(_BEAT):
                self._store.add(f"alive/{self.rank}", 1)

    # --- telling -----------------------------------------------------------------------------

    def gather(self, key: str, value: Any) -> list[Any]:
        """Return every rank's value, in their order; JSON-like, and each key once."""
        self._tell(f"{key}/{self.rank}", value)
        return [self._hear(f"{key}/{rank}", rank) for rank in range(self.size)]

    def from_first(self, key: str, value: Any = None) -> Any:
        """Return rank 0's value on all ranks."""
        if self.is_first:
            self._tell(key, value)
        return self._hear(key, 0)

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, tensors and all, in their order: the one collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the call: rank 0, in whose process the store may live, leaves last."""
        self._tell(f"left/{self.rank}", True)
        if self.is_first:
            for rank in range(self.size):
                self._hear(f"left/{rank}", rank)

    def _tell(self, key: str, value: Any) -> None:
        self._store.set(key, json.dumps(value))

    def _hear(self, key: str, rank: int) -> Any:
        """What a rank tells, once it does."""
        begun, tell_after, pause = monotonic(), _TELL_AFTER, 0.001
        beats, last = 0, begun
        while not self._store.check([key]):
            if self._store.check(["error"]) and not self._store.check([key]):
                failed = self._store.get("error").decode()
                raise RankError(f"stopped, because another rank failed: {failed}")
            if (found := self._store.add(f"alive/{rank}", 0)) != beats:
                beats, last = found, monotonic()
            elif beats and monotonic() - last > _SILENT and not self._store.check([key]):
                raise RankError(
                    f"stopped, because rank {rank} has shown no sign of life for {_SILENT:.0f} s: "
                    "it was killed, or its machine is gone. Call again, on as many ranks as there "
                    "are; with a store it goes on from what was kept"
                )
            if monotonic() - begun > tell_after:
                tell_after *= 2
                logger.warning(
                    "waiting for %r of the other ranks; all of them have to make the same call "
                    "of LossScorer.score (shared=False scores on one rank alone)",
                    key,
                )
            sleep(pause)
            pause = min(2 * pause, _SLOWEST)
        return json.loads(self._store.get(key))

    # --- sharing packs -----------------------------------------------------------------------

    def claims(self, todo: Sequence[int], *, ahead: bool) -> Iterator[int]:
        """Yield the packs that this rank is to run, each claimed when it is asked for.

        Args:
            todo: all packs, the same on every rank, the longest first.
            ahead: packs are claimed well before they are run (by DataLoader workers). Then the
                rank has to ask `begins` before it runs one, and when nothing is left to claim,
                what other ranks hold and have not begun is taken over.
        """
        ahead = self._ahead = ahead and self.size > 1
        if ahead:
            self._tell(f"held/{self.rank}", ["", []])
        while (place := self._store.add("claimed", 1) - 1) < len(todo):
            self.claimed, pack = place + 1, todo[place]
            if ahead:
                self._change(self.rank, functools.partial(_with, pack))
            self._holder[pack] = self.rank
            yield pack
        for rank in range(self.size) if ahead else ():
            if rank != self.rank and self._store.check([f"held/{rank}"]):
                for pack in reversed(json.loads(self._store.get(f"held/{rank}"))[1]):
                    self._holder[pack] = rank
                    yield pack

    def begins(self, pack: int) -> bool:
        """Return whether a pack from `claims` is still there for this rank to run."""
        if not self._ahead:
            return True
        return self._change(self._holder.pop(pack), functools.partial(_without, pack))

    def _change(self, rank: int, change: Callable[[list[int]], list[int] | None]) -> bool:
        """Change the list of what a rank holds, unless `change` finds nothing to do.

        The list carries who changed it last and when, so that of two ranks which would make the
        same change only one succeeds.
        """
        key = f"held/{rank}"
        seen = self._store.get(key).decode()
        while (wanted := change(json.loads(seen)[1])) is not None:
            text = json.dumps([f"{self.rank}.{next(self._changes)}", wanted])
            found = self._store.compare_set(key, seen, text).decode()
            if found == text:
                return True
            seen = found
        return False


def _with(pack: int, held: list[int]) -> list[int]:
    return [*held, pack]


def _without(pack: int, held: list[int]) -> list[int] | None:
    return [other for other in held if other != pack] if pack in held else None


def ranks_of_this_call(*, shared: bool) -> Ranks:
    """Return the ranks that make this call: those of the process group, or this process alone.

    The n-th call of one rank belongs to the n-th of every other. A DataLoader's worker, which may
    have inherited a process group, is alone.
    """
    grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (shared and grouped) or get_worker_info() is not None:
        return Ranks(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]
    rank = dist.get_rank()
    store = of_this_attempt(dist.distributed_c10d._get_default_store())
    call = store.add(f"flowdata/calls of rank {rank}", 1)
    return Ranks(_prefixed(f"flowdata/{call}", store), rank, dist.get_world_size())


def of_this_attempt(store: Any) -> Any:
    """Return a store's part that earlier attempts of a restarted job have not written to.

    torchrun's static rendezvous, the default on one node, keeps its store over restarts. On
    several nodes each attempt has a store of its own, and nodes may count restarts differently.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return store
    return _prefixed("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), store)


def _prefixed(prefix: str, store: Any) -> Any:
    return dist.PrefixStore(prefix, store)  # type: ignore[attr-defined]
