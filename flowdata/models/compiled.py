"""Compiled layers: one graph for all decoder layers and all shapes, where a job is long enough."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowdata._common.notices import logger

_GRAPHS = 64  # kinds of layers times kinds of shapes, before Dynamo gives up
# Floating point operations from which compiling pays. Compiling takes about 30 seconds. Intel CPUs
# with AMX score at about 3e11 a second in bfloat16 on two cores, and a tenth faster once
# compiled (2,820 and 3,067 tokens/s on GSM8K): 240 seconds' worth of matrix products at 6e11.
_PAYS_FROM = 240 * 6e11


def gains(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether compiled layers were measured to be faster on this kind of machine.

    They are on Intel CPUs with AMX in bfloat16, by 9 %. On AMD CPUs with AVX512-BF16 the gain is
    1 % (4,293 and 4,341 tokens/s), and nothing is measured on a GPU.
    """
    has_amx = device.type == "cpu" and bool(torch.cpu._is_amx_tile_supported())
    return has_amx and dtype == torch.bfloat16


def pays(model: nn.Module, tokens: int) -> bool:
    """Return whether a job of so many tokens is long enough for compiling to save time.

    A pure function of sizes, not of a timing: a resumed run must choose the same.
    """
    return 2 * _size(model) * tokens > _PAYS_FROM


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
