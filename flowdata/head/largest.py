"""The largest logits of every row, tile by tile: the logits never exist as a whole.

The vocabulary comes in slices, and the largest logits so far go on beside each slice's own::

                    vocabulary, in slices →
                  ┌─────────┬─────────┬────
        rows  ↓   │ tile ─┐ │ tile ─┐ │ …
                  └───────┼─┴───────┼─┴────
        largest ──────────┴─────────┴──→       of k + k logits, k go on
"""

from __future__ import annotations

import torch
from torch import Tensor

from flowdata.head.output_layer import Head, finish_logits
from flowdata.head.tiles import tile_size, tiles


def largest_logits(hidden: Tensor, head: Head, count: int) -> Tensor:
    """Return the largest logits of every row, in no order.

    The tiles are eager ones, whatever the head's kernel: the Triton kernel and a compiled pass keep
    sums alone.

    Args:
        hidden: (n, d) floating.
        head: its weight has the dtype of `hidden`.
        count: how many logits; fewer if there are not as many classes.

    Returns:
        (n, min(count, V)) float32.

    Example:
        >>> head = Head(torch.tensor([[1.0], [3.0], [2.0]]))
        >>> largest_logits(torch.ones(1, 1), head, 2).sort().values
        tensor([[2., 3.]])
    """
    rows, _ = tile_size(hidden)
    count = min(count, len(head.weight))
    return torch.cat([_of_rows(part, head, count) for part in hidden.split(rows)])


def _of_rows(hidden: Tensor, head: Head, count: int) -> Tensor:
    """The same of the rows of one matrix product."""
    largest = torch.full(
        (len(hidden), count), -torch.inf, device=hidden.device, dtype=torch.float32
    )
    no_targets = torch.full((len(hidden),), -1, device=hidden.device)  # no class is left out
    for rows, products, bias, buffer in tiles(hidden, head, no_targets):
        if buffer is None:
            logits = products.to(torch.float32, copy=True)
        else:
            logits = buffer[: products.numel()].view(products.shape).copy_(products)
        finish_logits(logits, bias, head.scale, head.softcap)
        of_tile = logits.topk(min(count, logits.shape[1]), sorted=False).values
        both = torch.cat([largest[rows], of_tile], 1)
        largest[rows] = both.topk(count, sorted=False).values
    return largest
