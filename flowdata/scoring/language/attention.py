"""Attention over samples laid end to end: a token sees its own sample, and a common prefix.

Hugging Face decoders that take their attention from `AttentionInterface` are given this one for
the time of a call. The samples lie in blocks, each of samples padded to one length: then every
block is a plain batch to the attention kernel, a view of the flat tensors without a copy.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.scoring.language.varlen import has_varlen, varlen

NAME = "flowdata_blocks"
_SCORES_AT_ONCE = 2**24  # of explicit attention, in float32
_KEYS = 16  # the CPU's bfloat16 kernel takes up to thrice as long for numbers of keys between


class Block(NamedTuple):
    """Samples that lie side by side, each padded to one length.

    Attributes:
        samples: how many.
        length: tokens of each.
        after: an earlier block, of one sample, that these samples see before themselves.
    """

    samples: int
    length: int
    after: int | None = None


KeysAndValues = list[tuple[Tensor, Tensor]]  # (1, H, T, d) each, layer by layer


@dataclass
class Pass:
    """One forward pass over blocks of samples, and what its layers leave behind.

    Attributes:
        blocks: in the order in which they lie.
        prefix: keys and values that every sample sees before its own; empty without a prefix.
        seen: this pass's own keys and values.
        layers: attention layers run so far.
    """

    blocks: list[Block]
    prefix: KeysAndValues = field(default_factory=list)
    seen: KeysAndValues | None = None
    layers: int = 0
    _masks: dict[tuple[int, int, int | None], Tensor] = field(default_factory=dict)

    def mask(self, length: int, before: int, window: int | None, keys: Tensor) -> Tensor:
        """Return what is added to a block's scores, (length, keys): 0, or −inf for no part."""
        if (length, before, window) not in self._masks:
            distance = torch.arange(before, before + length, device=keys.device)[:, None]
            distance = distance - torch.arange(keys.shape[2], device=keys.device)
            hidden = (distance < 0) if window is None else (distance < 0) | (distance >= window)
            added = torch.zeros(hidden.shape, dtype=keys.dtype, device=keys.device)
            self._masks[length, before, window] = added.masked_fill_(hidden, -torch.inf)
        return self._masks[length, before, window]


_running: ContextVar[Pass] = ContextVar("_running")


@contextmanager
def attending(model: nn.Module, run: Pass) -> Iterator[Pass]:
    """Let a model's attention layers run over blocks; its configuration is put back after."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    token = _running.set(run)
    try:
        for config, _ in before:  # not by its property, which sets sub-configurations as well
            config._attn_implementation_internal = NAME
        yield run
    finally:
        for config, name in before:
            config._attn_implementation_internal = name
        _running.reset(token)


def _attend(
    module: nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None = None,
    *,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    s_aux: Tensor | None = None,
    is_causal: bool | None = None,
    position_bias: Tensor | None = None,
    **_: Any,
) -> tuple[Tensor, None]:
    """As `AttentionInterface` calls it: (1, H, T, d) queries to (1, T, H, d) outputs."""
    causal = getattr(module, "is_causal", True) if is_causal is None else is_causal
    if attention_mask is not None or position_bias is not None or len(query) != 1 or not causal:
        raise ValueError(f"{type(module).__name__} asks for attention other than plain causal")
    scaling = query.shape[-1] ** -0.5 if scaling is None else scaling
    return _over_blocks(query, key, value, scaling, sliding_window, softcap, s_aux), None


@torch.library.custom_op("flowdata::over_blocks", mutates_args=())  # opaque to torch.compile
def _over_blocks(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    scaling: float,
    sliding_window: int | None,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    run = _running.get()
    if run.seen is not None:
        run.seen.append((key.clone(), value.clone()))
    before = run.prefix[run.layers] if run.prefix else None
    run.layers += 1
    plain = softcap is None and sinks is None
    if plain and has_varlen(query):
        return varlen(run.blocks, query, key, value, before, scaling, sliding_window)[None]
    whole = _KEYS if plain and query.is_cpu and query.dtype == torch.bfloat16 else 1
    parts, own, start = [], [], 0
    for count, length, after in run.blocks:
        stop = start + count * length
        q, k, v = (_block(flat, start, stop, count) for flat in (query, key, value))
        own.append((k, v))
        earlier = ([] if before is None else [before]) + ([] if after is None else [own[after]])
        extra = sum(keys.shape[2] for keys, _ in earlier)
        k, v = (_behind([pair[i] for pair in earlier], own[-1][i], whole) for i in (0, 1))
        windowed = sliding_window is not None and extra + length > sliding_window
        window = sliding_window if windowed else None
        if plain:
            mask = run.mask(length, extra, window, k) if extra or windowed else None
            out = F.scaled_dot_product_attention(
                q, k, v, mask, is_causal=mask is None, scale=scaling, enable_gqa=True
            )
        else:
            mask = run.mask(length, extra, window, k)
            out = _explicit(q, k, v, mask, scaling, softcap, sinks)
        parts.append(out.transpose(1, 2).flatten(0, 1))
        start = stop
    return torch.cat(parts)[None] if len(parts) > 1 else parts[0][None].contiguous()


@_over_blocks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])


def _block(flat: Tensor, start: int, stop: int, count: int) -> Tensor:
    """(1, H, T, d) to a block's (samples, H, length, d), a view."""
    heads, _, width = flat.shape[1:]
    return flat[0, :, start:stop].view(heads, count, -1, width).transpose(0, 1)


def _behind(earlier: Sequence[Tensor], own: Tensor, whole: int) -> Tensor:
    """A block's keys, or values, behind those that all its samples see before.

    Zeros that no query sees make their number a multiple of `whole`.
    """
    parts = [*(each.expand(len(own), -1, -1, -1) for each in earlier), own]
    missing = -sum(part.shape[2] for part in parts) % whole
    if missing:
        parts.append(own.new_zeros(1, 1, 1, 1).expand(*own.shape[:2], missing, own.shape[3]))
    return torch.cat(parts, 2) if len(parts) > 1 else own


def _explicit(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    mask: Tensor,
    scaling: float,
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """Softmax in float32 over capped scores and a sink, a few queries at a time."""
    groups = k.shape[1]
    q = q.unflatten(1, (groups, -1))
    k, v = k.unsqueeze(2), v.unsqueeze(2)
    out = q.new_empty(*q.shape[:-1], v.shape[-1])
    step = max(1, _SCORES_AT_ONCE // (q.shape[:3].numel() * k.shape[3]))
    for start in range(0, q.shape[3], step):
        rows = slice(start, start + step)
        scores = (q[..., rows, :] @ k.transpose(3, 4)).float() * scaling
        if softcap is not None:
            scores = (scores / softcap).tanh_() * softcap
        scores += mask[rows]
        if sinks is not None:
            column = sinks.float().view(1, groups, -1, 1, 1).expand(*scores.shape[:-1], 1)
            scores = torch.cat([scores, column], -1)
        weights = scores.softmax(-1)[..., : k.shape[3]].to(v.dtype)
        out[..., rows, :] = weights @ v
    return out.flatten(1, 2)
