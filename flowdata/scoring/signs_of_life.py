"""Signs of life: how a rank notices that another one is gone without having said so.

A rank that raises says so on the board (ranks.py). A rank that is killed, or whose machine is lost,
can't. So each rank has a counter on the board, to which a thread of its own adds 1 every few
seconds, and a rank that waits for another one watches that counter:

    rank 1          adds    1   2   3   4   (killed)
    rank 0, waiting reads   1   2   3   4   4   4   4   …   4   RankError
                                        └──── _SILENT ──────┘
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from threading import Event, Thread
from time import monotonic
from typing import Any

_BEAT = 5.0  # seconds between two signs of life
_SILENT = 120.0  # seconds without one, after which a rank counts as gone


@contextmanager
def signs_of_life(board: Any, rank: int) -> Iterator[None]:
    """Show this rank's signs of life during a block."""
    is_over = Event()
    thread = Thread(
        target=_beat, args=(board, rank, is_over), name="flowdata signs of life", daemon=True
    )
    thread.start()
    try:
        yield
    finally:
        is_over.set()
        thread.join()


def _beat(board: Any, rank: int, is_over: Event) -> None:
    with suppress(RuntimeError):  # the board is gone: whoever reads it next says so
        board.add(f"alive/{rank}", 1)
        while not is_over.wait(_BEAT):
            board.add(f"alive/{rank}", 1)


class LifeWatch:
    """Watches another rank's signs of life.

    Args:
        board: where they are shown.
        rank: the other rank's number.
    """

    def __init__(self, board: Any, rank: int) -> None:
        self._board, self._rank = board, rank
        self._count, self._changed_at = 0, monotonic()

    def why_gone(self) -> str:
        """Return why the rank counts as gone, "" as long as it doesn't.

        One that has shown no sign yet is waited for: it may still be loading its model.
        """
        count = self._board.add(f"alive/{self._rank}", 0)  # a counter is read by adding nothing
        if count != self._count:
            self._count, self._changed_at = count, monotonic()
        if count == 0 or monotonic() - self._changed_at <= _SILENT:
            return ""
        return (
            f"rank {self._rank} has shown no sign of life for {_SILENT:.0f} s: it was killed, or "
            "its machine is gone"
        )
