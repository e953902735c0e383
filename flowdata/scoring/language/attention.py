"""The seam to Hugging Face's attention: for the time of a call, decoders attend over blocks.

Decoders that take their attention from `AttentionInterface` find it under a name in their
configuration. For the call that name is ours, and each attention layer calls `_attend` with the
queries, keys and values of one flat sequence. Only the `Pass` knows which samples lie in it. The
layers have no argument for a `Pass`, so `_attend` finds it in a context variable.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.scoring.language.blocks import (
    AttentionOptions,
    Block,
    KeysAndValues,
    attend_by_block,
)
from flowdata.scoring.language.masks import Masks
from flowdata.scoring.language.varlen import has_varlen, varlen

NAME = "flowdata_blocks"


@dataclass
class Pass:
    """One forward pass over blocks of samples, and what its layers leave behind.

    Attributes:
        blocks: in the order in which they lie.
        prefix: keys and values that every sample sees before its own, layer by layer; empty
            without a prefix.
        record: takes the pass's own keys and values, layer by layer; None to keep none.
        by_products: whether a CPU makes plain attention by products (products.py).
        layers: attention layers run so far.
        masks: of its blocks.
    """

    blocks: list[Block]
    prefix: list[KeysAndValues] = field(default_factory=list)
    record: list[KeysAndValues] | None = None
    by_products: bool = False
    layers: int = 0
    masks: Masks = field(default_factory=Masks)


_running: ContextVar[Pass] = ContextVar("_running")


@contextmanager
def attending(model: nn.Module, run: Pass) -> Iterator[Pass]:
    """Let a model's attention layers run over blocks; its configuration is put back after."""
    from transformers import AttentionInterface

    AttentionInterface.register(NAME, _attend)
    # Each configuration by its own attribute: the property would set sub-configurations as well,
    # which may have had other names.
    configs = {id(m.config): m.config for m in model.modules() if hasattr(m, "config")}
    before = [
        (config, config._attn_implementation_internal)
        for config in configs.values()
        if hasattr(config, "_attn_implementation_internal")
    ]
    token = _running.set(run)
    try:
        for config, _ in before:
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


# This is an operator of its own so that torch.compile does not trace into it: it would make a
# graph for every set of blocks, and one for every layer because of the counter.
@torch.library.custom_op("flowdata::over_blocks", mutates_args=())
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
    if run.record is not None:
        run.record.append((key.clone(), value.clone()))
    before = run.prefix[run.layers] if run.prefix else None  # layers are called in their order
    run.layers += 1
    options = AttentionOptions(scaling, sliding_window, softcap, sinks)
    if options.is_plain and has_varlen(query):
        return varlen(run.blocks, query, key, value, before, scaling, sliding_window)[None]
    return attend_by_block(
        run.blocks, query, key, value, before, options, run.masks, by_products=run.by_products
    )


@_over_blocks.register_fake
def _(query: Tensor, key: Tensor, value: Tensor, *_: Any) -> Tensor:
    return query.new_empty(1, query.shape[2], query.shape[1], value.shape[3])
