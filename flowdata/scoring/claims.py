"""Claims: how ranks share packs. Whoever is ready takes the next one, so slow ranks get fewer.

1. **Claim.** The board has one counter, `claimed`. A rank adds 1 to it and is told the sum, which
   is the pack's place in a list that all ranks have alike. No two ranks are told the same sum, so
   no pack is run twice. A claim is one round trip to the board.

       packs of the list     17   4   9   2  11 …
       claimed                1   2   3   4
       claimed by rank        0   1   1   0

   Where a rank loads its own batches that is all: it claims a pack, runs it, claims the next.

2. **Hold.** DataLoader workers load ahead, so that packs are claimed well before they are run.
   A rank with workers keeps the list of packs that it holds on the board, under `held/RANK`.

3. **Begin.** Before a rank runs a pack it strikes it off the list that holds it (`begins`).

4. **Take over.** A rank that finds the counter at the end claims what stands on the others' lists,
   from their ends, which their owners would come to last. It has to strike such a pack off before
   it runs it, like the owner, and whoever is first runs it.

       held/0   [11, 20, 8]      rank 0 is slow; rank 1 is through with the list
       rank 1 begins 8           held/0 becomes [11, 20]
       rank 0 begins 11, 20      and of 8 it is told that it isn't there any more

Lists are changed by `compare_set`: the board takes a new text for a key only if the text there is
still the one that the rank has read. Whose change came too late reads the list again.
"""

from __future__ import annotations

import functools
import itertools
import json
from collections.abc import Callable, Iterator, Sequence
from typing import Any

_CLAIMED = "claimed"
_MORE_THAN_ANY = 1 << 40  # packs


class Claims:
    """The packs that one rank is to run; iterating claims one after another.

    Args:
        board: the `torch.distributed.Store` through which the ranks talk.
        rank: this rank's number.
        size: how many ranks there are.
        packs: all packs to run, the same on every rank, the costliest first.
        ahead: packs are claimed well before they are run, by DataLoader workers. The rank then
            has to ask `begins` before it runs one.
    """

    def __init__(
        self, board: Any, rank: int, size: int, packs: Sequence[int], *, ahead: bool
    ) -> None:
        self._board, self._rank, self._size, self._packs = board, rank, size, packs
        self._holds = ahead and size > 1
        self._holders: dict[int, int] = {}  # pack → the rank on whose list it stands
        self._changes = itertools.count()
        self.claimed = 0  # packs that all ranks had claimed, when this one last claimed one

    def __iter__(self) -> Iterator[int]:
        if self._holds:
            self._board.set(f"held/{self._rank}", self._signed([]))
        while (place := self._board.add(_CLAIMED, 1) - 1) < len(self._packs):
            self.claimed, pack = place + 1, self._packs[place]
            if self._holds:
                self._change_list(self._rank, functools.partial(_with, pack))
                self._holders[pack] = self._rank
            yield pack
        self.claimed = len(self._packs)
        if self._holds:
            yield from self._held_by_others()

    def _held_by_others(self) -> Iterator[int]:
        for rank in range(self._size):
            if rank == self._rank or not self._board.check([f"held/{rank}"]):
                continue
            for pack in reversed(_packs_in(self._board.get(f"held/{rank}").decode())):
                self._holders[pack] = rank
                yield pack

    def begins(self, pack: int) -> bool:
        """Return whether a claimed pack is this rank's to run, rather than another's by now."""
        if not self._holds:
            return True
        return self._change_list(self._holders.pop(pack), functools.partial(_without, pack))

    def _change_list(self, rank: int, change: Callable[[list[int]], list[int] | None]) -> bool:
        """Change the list that a rank holds; return False if `change` finds nothing to change."""
        key = f"held/{rank}"
        text = self._board.get(key).decode()
        while (packs := change(_packs_in(text))) is not None:
            new_text = self._signed(packs)
            text_now = self._board.compare_set(key, text, new_text).decode()
            if text_now == new_text:
                return True
            text = text_now
        return False

    def _signed(self, packs: list[int]) -> str:
        """The text of a list, with who wrote it and when.

        `compare_set` answers with the text that is there. Were the same change of two ranks the
        same text, the one that came too late would take the other's for its own.
        """
        return json.dumps([f"{self._rank}.{next(self._changes)}", packs])


def _packs_in(text: str) -> list[int]:
    packs: list[int] = json.loads(text)[1]
    return packs


def _with(pack: int, packs: list[int]) -> list[int]:
    return [*packs, pack]


def _without(pack: int, packs: list[int]) -> list[int] | None:
    return [other for other in packs if other != pack] if pack in packs else None


def end_claims(board: Any) -> None:
    """Let every rank that claims a pack from now on find the counter at the list's end."""
    board.add(_CLAIMED, _MORE_THAN_ANY)
