"""Attention by plain matrix products, for CPUs on which PyTorch's attention kernel is slow.

On an AMD EPYC with AVX-512's bfloat16 the kernel takes 1.8 times as long as these products at 96 to
320 tokens, and as long at 4,096 (`python -m benchmarks attention`). Queries are taken a few rows at
a time, so that a row meets no keys that lie wholly behind it. One product takes the rows of as many
samples and heads as fit into a buffer:

            keys  0 .. 31    32 .. 63    64 ..
    rows  0 .. 31   masked
    rows 32 .. 63   whole     masked
    rows 64 ..      whole     whole      masked

Heads that share keys lie in one product with them, and no key is copied for each of its heads.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import torch
from torch import Tensor

from flowdata._common.processor import has_amx, has_bfloat16
from flowdata.scoring.language.masks import Masks

_ROWS = 32  # queries of a sample in one product
_SCORES = 2**19  # in one product, 2 MiB in float32: half and twice as many were slower


def products_gain(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether products were measured to be faster on this kind of machine.

    They are on CPUs with AVX-512's bfloat16 and without AMX. With AMX the kernel is fast, and a
    product of each sample and head alone took 2 to 5 times as long as it.
    """
    return device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16() and not has_amx()


def attend_by_products(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    window: int | None,
    masks: Masks,
    into: Tensor,
) -> None:
    """Write the causal attention of samples of one length.

    Scores and their softmax are float32, as in the kernel: rounded to bfloat16, scores of 16 and
    more, which trained models have, would be off by 0.06. The values' shares are in their dtype.

    Args:
        query: (samples, H, length, d).
        key: (samples, H_kv, before + length, d), what every sample sees before its own first.
        value: (samples, H_kv, before + length, d_v).
        scaling: factor on the products.
        window: keys that a query sees at most, itself included; None for all.
        masks: of the pass.
        into: (samples, H, length, d_v), of any strides, what is written.
    """
    samples, heads, length, _ = query.shape
    groups, before = key.shape[1], key.shape[2] - length
    # (samples, groups, heads, length, d)
    queries, outputs = (each.unflatten(1, (groups, -1)) for each in (query, into))
    # There are fewer keys than queries, so that the factor is theirs.
    key, value = (key.float() * scaling).contiguous().transpose(2, 3), value.contiguous()
    # New memory for each product would cost as much as the product.
    size = max(_SCORES, heads // groups * _ROWS * key.shape[3])
    memory = key.new_empty(size), value.new_empty(size)
    for start in range(0, length, _ROWS):
        rows = slice(start, min(start + _ROWS, length))
        first = 0 if window is None else max(0, before + start + 1 - window)
        keys = slice(first, before + rows.stop)
        mask = _mask(rows.stop - start, keys.stop - first, window, masks, key)
        scores_of_group = heads // groups * (rows.stop - start) * (keys.stop - first)
        for part in _parts(samples, groups, max(1, _SCORES // scores_of_group)):
            part_queries = queries[part][..., rows, :].float().flatten(0, 1)
            shares = _shares(part_queries, key[part][..., keys].flatten(0, 1), mask, memory)
            output = shares @ value[part][..., keys, :].flatten(0, 1)
            place = outputs[part][..., rows, :]
            place.copy_(output.view_as(place))


def _parts(samples: int, groups: int, most: int) -> Iterator[tuple[slice, slice]]:
    """Yield the samples, and the groups of their heads, of each product: at most `most` groups."""
    sample_step, group_step = max(1, most // groups), min(most, groups)
    for sample in range(0, samples, sample_step):
        for group in range(0, groups, group_step):
            yield slice(sample, sample + sample_step), slice(group, group + group_step)


def _mask(queries: int, keys: int, window: int | None, masks: Masks, like: Tensor) -> Tensor:
    """What is added to the scores of the last keys, (queries, keys that some query doesn't see).

    The queries are the last of those that see the keys. Without a window all of them see what lies
    before them.
    """
    masked = queries if window is None else keys
    return masks.mask(queries, masked - queries, window, masked, like)


def _shares(rows: Tensor, keys: Tensor, mask: Tensor, memory: tuple[Tensor, Tensor]) -> Tensor:
    """The softmax of the products of rows and keys, (B, heads · queries, keys).

    Args:
        rows: (B, heads, queries, d) float32.
        keys: (B, d, keys) float32.
        mask: (queries, masked keys), added to the scores of the last keys.
        memory: for the scores in float32, and for the shares in the dtype of the result.
    """
    shape = len(rows), rows.shape[1:3].numel(), keys.shape[2]
    scores, shares = (each[: math.prod(shape)].view(shape) for each in memory)
    torch.bmm(rows.flatten(1, 2), keys, out=scores)
    scores.unflatten(1, rows.shape[1:3])[..., -mask.shape[1] :].add_(mask)
    torch.softmax(scores, -1, out=scores)
    return shares.copy_(scores)
