"""Compiled layers: one graph for all decoder layers and all shapes, where a job is long enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowdata._common.notices import logger

_GRAPHS = 64  # kinds of layers times kinds of shapes, before Dynamo gives up
_FLOPS = {torch.bfloat16: 6e11, torch.float16: 1e11, torch.float32: 1e11}  # a second, two cores
# Seconds of a job's FLOPs, of which scoring reaches about half: compiling takes about 30 seconds
# and saves about a tenth.
_PAYS_FROM = 240.0


def pays(model: nn.Module, tokens: int, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether compiling is likely to save time on a job of so many tokens.

    A pure function of sizes and kinds, not of a timing: a resumed run must choose the same.
    """
    if device.type != "cpu" or dtype not in _FLOPS:
        return False  # not measured elsewhere
    flops = 2 * _size(model) * tokens
    return flops / _FLOPS[dtype] > _PAYS_FROM


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Compile a model's layers for a block, or the whole of a model that has none.

    All layers of a kind share one graph, with sizes left open. Where the machine can't compile,
    they run as they are and the reason is logged.
    """
    reason = _why_not()
    if reason:
        logger.warning("not compiling: %s", reason)
        yield
        return
    regions = _regions(model)
    before = [region._compiled_call_impl for region in regions]
    dynamo: Any = torch._dynamo
    with dynamo.config.patch(recompile_limit=_GRAPHS, accumulated_recompile_limit=8 * _GRAPHS):
        try:
            for region in regions:
                region.compile(dynamic=True)
            yield
        finally:
            for region, call in zip(regions, before, strict=True):
                region._compiled_call_impl = call


def is_compiled(model: nn.Module) -> bool:
    """Return whether the model is inside `compiled_layers`, and not run eagerly after all."""
    return all(region._compiled_call_impl is not None for region in _regions(model))


def run_eagerly(model: nn.Module) -> None:
    """Leave the block's compiled layers as they are written, for what remains of it."""
    for region in _regions(model):
        region._compiled_call_impl = None


def _regions(model: nn.Module) -> list[nn.Module]:
    """A model's layers, the list of modules that holds most of its parameters; else the model."""
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda each: sum(map(_size, each)), default=[]) or [model]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _why_not() -> str:
    try:
        torch.compile(lambda values: values.sin() + 1, dynamic=True)(torch.ones(8))
    except Exception as error:  # no compiler, no headers, a full disk: whatever it is
        return f"{type(error).__name__}: {error}".splitlines()[0]
    return ""
