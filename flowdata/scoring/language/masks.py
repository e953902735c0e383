"""Masks of causal attention, each made once for a pass over blocks."""

from __future__ import annotations

import torch
from torch import Tensor


class Masks:
    """The masks of one pass, each made once: layers of a kind and blocks of a length share them.

    Three queries behind two keys of a prefix or prompt (p), in rows of eight keys of which the
    last three are padding (0), without a window and with one of three keys; · is −inf:

              p p a b c 0 0 0          p p a b c 0 0 0
        a     x x x · · · · ·          x x x · · · · ·
        b     x x x x · · · ·          · x x x · · · ·
        c     x x x x x · · ·          · · x x x · · ·
    """

    def __init__(self) -> None:
        self._masks: dict[tuple[int, int, int | None, int], Tensor] = {}

    def mask(self, length: int, before: int, window: int | None, keys: int, like: Tensor) -> Tensor:
        """Return what is added to a block's scores, (length, keys): 0, or −inf for unseen keys.

        Args:
            length: queries of a sample.
            before: keys before a sample's own.
            window: keys that a query sees at most, itself included.
            keys: their number, before + length or, with padding behind, more.
            like: a tensor of the dtype and on the device of the scores.
        """
        key = length, before, window, keys
        if key not in self._masks:
            queries = torch.arange(before, before + length, device=like.device)
            distances = queries[:, None] - torch.arange(keys, device=like.device)
            is_unseen = distances < 0  # keys of later tokens, padding among them
            if window is not None:
                is_unseen |= distances >= window
            mask = torch.zeros(is_unseen.shape, dtype=like.dtype, device=like.device)
            self._masks[key] = mask.masked_fill_(is_unseen, -torch.inf)
        return self._masks[key]
