"""Attention over blocks: samples padded to one length, a plain batch to an attention kernel.

Samples lie end to end in tensors of shape (1, H, T, d). The tokens of a block lie side by side, so
that its queries are a view of the flat ones, (samples, H, length, d), without a copy:

    flat      a a a a b b b b c c d d e e          T = 14
    blocks    [a a a a]  [c c]
              [b b b b]  [d d]
                         [e e]

Its keys are a view as well, unless its samples see others before their own: a common prefix, or
the prompt that they answer. Then those are put before each sample's.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.scoring.language.masks import Masks
from flowdata.scoring.language.products import attend_by_products

# Scores of explicit attention that are held at once: 64 MiB in float32, whatever the samples.
_SCORES_AT_ONCE = 2**24
# Numbers of keys are multiples of this for the CPU's bfloat16 kernel. For numbers between, it took
# up to 3 times as long on an Intel Xeon with AMX, 1.7 times on an AMD EPYC with AVX-512's bfloat16.
_KEYS = 16


class Block(NamedTuple):
    """Samples that lie side by side, each padded to one length.

    Attributes:
        samples: how many.
        length: tokens of each.
        after: the number of an earlier block, of one sample, that these samples see before
            themselves.
    """

    samples: int
    length: int
    after: int | None = None


KeysAndValues = tuple[Tensor, Tensor]  # (1, H_kv, T, d) each, of one layer


class AttentionOptions(NamedTuple):
    """What a layer makes of the products of queries and keys.

    Attributes:
        scaling: factor on the products.
        window: keys that a query sees at most, itself included; None for all.
        softcap: the bound of the scores, by softcap · tanh(score / softcap), or None.
        sinks: (H,) scores of a key without a value, which takes a share of every query's
            attention; or None.
    """

    scaling: float
    window: int | None
    softcap: float | None
    sinks: Tensor | None

    @property
    def is_plain(self) -> bool:
        """Whether PyTorch's kernels can do it."""
        return self.softcap is None and self.sinks is None


def attend_by_block(
    blocks: Sequence[Block],
    query: Tensor,
    key: Tensor,
    value: Tensor,
    before: KeysAndValues | None,
    options: AttentionOptions,
    masks: Masks,
    *,
    by_products: bool = False,
) -> Tensor:
    """Return the causal attention of all samples, one block after another, (1, T, H, d).

    Args:
        blocks: in the order in which they lie.
        query: (1, H, T, d).
        key: (1, H_kv, T, d).
        value: (1, H_kv, T, d).
        before: keys and values that every sample sees before its own, (1, H_kv, P, d) each.
        options: of the layer.
        masks: of the pass.
        by_products: whether plain attention is made by products.py instead of PyTorch's kernel.
    """
    heads, tokens = query.shape[1:3]
    output = query.new_empty(1, tokens, heads, value.shape[3])
    of_blocks: list[KeysAndValues] = []
    start = 0
    for samples, length, after in blocks:
        stop = start + samples * length
        flat = query, key, value, output.transpose(1, 2)
        q, k, v, into = (_view(each, start, stop, samples) for each in flat)
        of_blocks.append((k, v))
        earlier = [] if before is None else [before]
        if after is not None:
            earlier.append(of_blocks[after])
        _attend_block(q, k, v, earlier, options, masks, into, by_products=by_products)
        start = stop
    return output


def _view(flat: Tensor, start: int, stop: int, samples: int) -> Tensor:
    """(1, H, T, d) to a block's (samples, H, length, d), a view."""
    heads, _, width = flat.shape[1:]
    return flat[0, :, start:stop].view(heads, samples, -1, width).transpose(0, 1)


def _attend_block(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    earlier: Sequence[KeysAndValues],
    options: AttentionOptions,
    masks: Masks,
    into: Tensor,
    *,
    by_products: bool,
) -> None:
    """Write one block's attention, behind what all its samples see before.

    Args:
        q: (samples, H, length, d), the block's own.
        k, v: (samples, H_kv, length, d) and (samples, H_kv, length, d_v).
        earlier: what its samples see before themselves, (1, H_kv, P, d) each.
        options: of the layer.
        masks: of the pass.
        into: (samples, H, length, d_v), what is written.
        by_products: see `attend_by_block`.
    """
    length, before = q.shape[2], sum(keys.shape[2] for keys, _ in earlier)
    uses_kernel = options.is_plain and not by_products
    multiple = _KEYS if uses_kernel and q.is_cpu and q.dtype == torch.bfloat16 else 1
    k = _behind([keys for keys, _ in earlier], k, multiple)
    v = _behind([values for _, values in earlier], v, multiple)
    # A window that reaches over all keys hides none: without it the kernel may need no mask.
    is_windowed = options.window is not None and before + length > options.window
    window = options.window if is_windowed else None
    if not options.is_plain:
        unseen = masks.mask(length, before, window, k.shape[2], k)
        _attend_explicitly(q, k, v, unseen, options, into)
    elif by_products:
        attend_by_products(q, k, v, options.scaling, window, masks, into)
    else:
        # `is_causal` lets query i see keys 0 to i: right where each sample's own keys come first.
        needs_mask = before or is_windowed
        mask = masks.mask(length, before, window, k.shape[2], k) if needs_mask else None
        output = F.scaled_dot_product_attention(
            q, k, v, mask, is_causal=mask is None, scale=options.scaling, enable_gqa=True
        )
        into.copy_(output)


def _behind(earlier: Sequence[Tensor], own: Tensor, multiple: int) -> Tensor:
    """A block's keys, or values, behind those that all its samples see before.

    Zeros that no query sees make their number a multiple of `multiple`.
    """
    parts = [*(each.expand(len(own), -1, -1, -1) for each in earlier), own]
    padding = -sum(part.shape[2] for part in parts) % multiple
    if padding:
        parts.append(own.new_zeros(1, 1, 1, 1).expand(*own.shape[:2], padding, own.shape[3]))
    return torch.cat(parts, 2) if len(parts) > 1 else own


def _attend_explicitly(
    q: Tensor, k: Tensor, v: Tensor, mask: Tensor, options: AttentionOptions, into: Tensor
) -> None:
    """Write attention by a softmax in float32 over capped scores and a sink, a few queries at once.

    Tensors are those of `_attend_block`; the mask is (length, keys), added to scores.
    """
    groups, keys = k.shape[1:3]
    # Each head of keys serves a group of query heads: (samples, groups, heads, queries, d).
    q, outputs = (each.unflatten(1, (groups, -1)) for each in (q, into))
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    step = max(1, _SCORES_AT_ONCE // (q.shape[:3].numel() * keys))
    for start in range(0, q.shape[3], step):
        rows = slice(start, start + step)
        scores = (q[..., rows, :] @ k.transpose(3, 4)).float() * options.scaling
        if options.softcap is not None:
            scores = (scores / options.softcap).tanh_() * options.softcap
        scores += mask[rows]
        if options.sinks is not None:
            sinks = options.sinks.float().view(1, groups, -1, 1, 1)
            scores = torch.cat([scores, sinks.expand(*scores.shape[:-1], 1)], -1)
        weights = scores.softmax(-1)[..., :keys].to(v.dtype)  # the sink has no value
        outputs[..., rows, :] = weights @ v
