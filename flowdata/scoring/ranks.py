"""Ranks: the processes that share one call of `LossScorer.score`, and what they tell each other.

They talk through a *board*: the key-value store with which their process group was begun
(torch.distributed says `Store`; here a store is the folder that keeps losses). A rank posts values
under keys, and reads what others have posted. The board lives where the group's launcher put it, in
torchrun's agent or in rank 0.

    key              posted by        it says
    NAME/RANK        each rank        this rank's part of `gather(NAME, …)`
    NAME             rank 0           what `from_first(NAME, …)` hands to all
    error            a failed rank    why: whoever waits for anything stops with the same reason
    alive/RANK       each rank        that it is still there (signs_of_life.py)
    claimed, held/…  each rank        which packs it runs (claims.py)
    left/RANK        each rank        that it won't look at the board again

Collectives would hold all ranks up until the slowest comes, and leave them hanging where one never
does. Reading the board holds up only the rank that reads, and between two looks it can notice that
another rank has failed or is gone. One collective remains, `exchange`, after the last pack.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext, suppress
from time import monotonic, sleep
from typing import Any, TypeVar

import torch.distributed as dist
from torch.utils.data import get_worker_info

from flowdata._common.notices import logger
from flowdata.errors import RankError
from flowdata.scoring.claims import Claims, end_claims
from flowdata.scoring.signs_of_life import LifeWatch, signs_of_life

SAME_CALL = "All ranks have to make the same call"  # the remedy of a mismatch between ranks
_FIRST_PAUSE, _LONGEST_PAUSE = 0.001, 0.2  # seconds between two looks at the board
_TELL_AFTER = 60.0  # seconds of waiting, then again after each doubling
_LINGER = 5.0  # seconds for which a failed rank 0 waits for the others to hear of it
T = TypeVar("T")


class Ranks:
    """This process among those that share a call.

    Args:
        board: the `torch.distributed.Store` they talk through; a new one for each call.
        rank: this process's number.
        size: how many they are.
    """

    def __init__(self, board: Any, rank: int, size: int) -> None:
        self._board, self.rank, self.size = board, rank, size

    @property
    def is_first(self) -> bool:
        """Whether this is rank 0, which reads and writes for all."""
        return self.rank == 0

    def claims(self, packs: Sequence[int], *, ahead: bool) -> Claims:
        """Return the packs that this rank is to run (see `Claims`), each claimed when asked for."""
        return Claims(self._board, self.rank, self.size, packs, ahead=ahead)

    # --- what ranks tell each other ----------------------------------------------------------

    def gather(self, name: str, value: Any) -> list[Any]:
        """Return every rank's value, in their order; JSON-like, and each name once a call."""
        self._post(f"{name}/{self.rank}", value)
        return [self._read(f"{name}/{rank}", rank) for rank in range(self.size)]

    def from_first(self, name: str, value: Any = None) -> Any:
        """Return rank 0's value on all ranks."""
        if self.is_first:
            self._post(name, value)
        return self._read(name, 0)

    def exchange(self, value: T) -> list[T]:
        """Return every rank's value, tensors and all, in their order: the one collective."""
        values: list[Any] = [None] * self.size
        dist.all_gather_object(values, value)
        return values

    def leave(self) -> None:
        """End the call: rank 0, in whose process the board may live, leaves last."""
        self._post(f"left/{self.rank}", True)
        if self.is_first:
            for rank in range(self.size):
                self._read(f"left/{rank}", rank)

    def _post(self, key: str, value: Any) -> None:
        self._board.set(key, json.dumps(value))

    def _is_posted(self, key: str) -> bool:
        return bool(self._board.check([key]))

    def _read(self, key: str, rank: int) -> Any:
        """Wait until a rank has posted a value under a key, and return it."""
        watch = LifeWatch(self._board, rank)
        begun, tell_after, pause = monotonic(), _TELL_AFTER, _FIRST_PAUSE
        while not self._is_posted(key):
            self._check_awaited(key, watch)
            if monotonic() - begun > tell_after:
                tell_after *= 2
                logger.warning(
                    "waiting for %r of the other ranks; all of them have to make the same call "
                    "of LossScorer.score (shared=False scores on one rank alone)",
                    key,
                )
            sleep(pause)
            pause = min(2 * pause, _LONGEST_PAUSE)
        return json.loads(self._board.get(key))

    def _check_awaited(self, key: str, watch: LifeWatch) -> None:
        """Raise RankError where a value will never be posted.

        A rank may have posted the value, and failed or ended after that, since the last look at
        the key. So the key is looked at once more: a value that is there counts.
        """
        if self._is_posted("error") and not self._is_posted(key):
            failure = self._board.get("error").decode()
            raise RankError(f"stopped, because another rank failed: {failure}")
        reason = watch.why_gone()
        if reason and not self._is_posted(key):
            raise RankError(
                f"stopped, because {reason}. Call again, on as many ranks as there are; with a "
                "store it goes on from what was kept"
            )

    # --- failing -----------------------------------------------------------------------------

    @contextmanager
    def failing_together(self) -> Iterator[None]:
        """Let an error in the block, or this process's death, reach all ranks that wait for it."""
        try:
            with signs_of_life(self._board, self.rank) if self.size > 1 else nullcontext():
                yield
        except dist.DistNetworkError as error:
            raise RankError(
                "stopped, because the process that the ranks talk through (rank 0, or torchrun) is "
                f"gone; its own output says why ({error})"
            ) from error
        except BaseException as error:
            with suppress(RuntimeError):  # the board is gone: the others notice that themselves
                self._post_failure(error)
            raise

    def _post_failure(self, error: BaseException) -> None:
        if not isinstance(error, RankError):  # which tells of a failure that is posted already
            self._board.set("error", f"rank {self.rank}: {type(error).__name__}: {error}")
            end_claims(self._board)
        self._post(f"left/{self.rank}", True)
        self._linger()

    def _linger(self) -> None:
        """Let rank 0, in whose process the board may live, stay until the others have heard."""
        deadline, others = monotonic() + _LINGER, range(1, self.size if self.is_first else 0)
        while monotonic() < deadline and not all(
            self._is_posted(f"left/{rank}") for rank in others
        ):
            sleep(0.01)


def ranks_of_this_call(*, shared: bool) -> Ranks:
    """Return the ranks that make this call: those of the process group, or this process alone.

    The n-th call of one rank belongs to the n-th of every other. A DataLoader's worker, which may
    have inherited a process group, is alone.
    """
    grouped = dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1
    if not (shared and grouped) or get_worker_info() is not None:
        return one_rank()
    rank = dist.get_rank()
    board = of_this_attempt(dist.distributed_c10d._get_default_store())
    call = board.add(f"flowdata/calls of rank {rank}", 1)
    return Ranks(_under(f"flowdata/{call}", board), rank, dist.get_world_size())


def one_rank() -> Ranks:
    """Return this process as the only rank, with a board of its own."""
    return Ranks(dist.HashStore(), 0, 1)  # type: ignore[attr-defined]


def of_this_attempt(board: Any) -> Any:
    """Return the part of a board that earlier attempts of a restarted job have not written to.

    torchrun's static rendezvous, the default on one node, keeps its board over restarts. On
    several nodes each attempt has a board of its own, and nodes may count restarts differently.
    """
    if os.environ.get("LOCAL_WORLD_SIZE") != os.environ.get("WORLD_SIZE"):
        return board
    return _under("attempt " + os.environ.get("TORCHELASTIC_RESTART_COUNT", "0"), board)


def _under(prefix: str, board: Any) -> Any:
    """The part of a board whose keys begin with a prefix, which it adds to them."""
    return dist.PrefixStore(prefix, board)  # type: ignore[attr-defined]
