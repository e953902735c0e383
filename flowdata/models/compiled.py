"""Compiling: a model's layers, and the head's sums, through `torch.compile`.

This file holds all that the library knows of it: whether it pays, the block in which a model's
layers are compiled, and the way back. Everything else asks here.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import nn

from flowdata._common.excerpts import first_line
from flowdata._common.notices import logger
from flowdata._common.processor import has_bfloat16
from flowdata.models.placement import home

# Graphs of one layer's code before Dynamo gives up and runs it eagerly: kinds of layers (sliding
# and full attention, …) times kinds of inputs. Its own limit of 8 is too low for both together.
_GRAPHS = 64
# Floating point operations of a job from which compiling pays: four minutes of it, since compiling
# takes 10 to 30 seconds and makes the rest a tenth faster. Intel CPUs with AMX score at 6e11 a
# second on two cores once compiled, an H200 at 4e14.
_PAYS_FROM = {"cpu": 240 * 6e11, "cuda": 240 * 4e14}


def gains(dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether compiled layers were measured to be faster on this kind of machine.

    In half precision they are on GPUs, by 11 % (a Llama of a billion parameters on an H200). In
    bfloat16 they are on Intel CPUs with AMX and on AMD CPUs with AVX-512's bfloat16, by 9 %.
    `python -m benchmarks gpu` and `scoring` measure it.
    """
    if device.type == "cuda":
        return dtype in (torch.bfloat16, torch.float16)
    return device.type == "cpu" and dtype == torch.bfloat16 and has_bfloat16()


def pays(model: nn.Module, tokens: int, device: torch.device) -> bool:
    """Return whether a job of so many tokens is long enough for compiling to save time.

    It depends on sizes and not on a timing, because a resumed run must choose the same.
    """
    return 2 * _size(model) * tokens > _PAYS_FROM[device.type]


@contextmanager
def compiled_layers(model: nn.Module) -> Iterator[None]:
    """Compile a model's layers for a block, or the whole of a model that has none.

    All layers of a kind share one graph, with sizes left open. Where the machine can't compile,
    they run as they are and the reason is logged. The caller's own compiled calls come back at the
    end.
    """
    reason = _why_not(home(model))
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
    """Return whether a model's layers are compiled: inside `compiled_layers`, before `give_up`."""
    return all(region._compiled_call_impl is not None for region in _regions(model))


def give_up(model: nn.Module, reason: str) -> None:
    """Run a model's layers as they are written for the rest of the block, and log the reason."""
    logger.warning("not compiling: %s", reason)
    for region in _regions(model):
        region._compiled_call_impl = None


@contextmanager
def as_written(model: nn.Module) -> Iterator[None]:
    """Run all code as it is written for a block: a model's compiled layers, and functions."""
    regions = _regions(model)
    calls = [region._compiled_call_impl for region in regions]
    for region in regions:
        region._compiled_call_impl = None
    try:
        with torch.compiler.set_stance("force_eager"):
            yield
    finally:
        for region, call in zip(regions, calls, strict=True):
            region._compiled_call_impl = call


@functools.cache
def one_pass(function: Callable[..., Any]) -> Callable[..., Any]:
    """Return a function of tensors compiled into one pass over them, for tensors of any sizes.

    It is compiled at its first call, once for all models of the process.
    """
    return torch.compile(function, dynamic=True)


def _regions(model: nn.Module) -> list[nn.Module]:
    """What is compiled: the layers of the module list with the most parameters, else the model.

    Layers of a kind share a graph, so that the time to compile doesn't grow with their number.
    """
    lists = [list(m) for m in model.modules() if isinstance(m, nn.ModuleList)]
    return max(lists, key=lambda layers: sum(map(_size, layers)), default=[]) or [model]


def _size(module: nn.Module) -> int:
    return sum(parameter.numel() for parameter in module.parameters())


def _why_not(device: torch.device) -> str:
    """Why a device's code can't be compiled here, "" if it can: told by compiling a small piece."""
    try:
        torch.compile(lambda values: values.sin() + 1, dynamic=True)(torch.ones(8, device=device))
    except Exception as error:  # no compiler, no headers, a full disk: whatever it is
        return first_line(error)
    return ""
