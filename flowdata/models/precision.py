"""Precision: which dtype a model is run in."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path
from types import MethodType
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.placement import is_placed

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(
    dtype: str | torch.dtype, model: nn.Module, device: torch.device, *, one_target: bool = False
) -> torch.dtype:
    """Return the dtype to run a model in.

    A dtype that the user names is taken. ``"auto"`` is the model's own dtype, that of its first
    floating parameter (float32 where it has none), unless bfloat16 saves time and costs nothing
    that matters. That is so where all of these hold:

    - the model's own dtype is float32;
    - the device is fast at bfloat16 (`is_fast_at_bfloat16`);
    - the model can be converted: it is not sharded, spread over devices, quantised, nor made of
      parts in several dtypes;
    - what is computed does not rest on one target, as a classifier's loss does, nor is it features
      that a head is fitted to, nor predictions that two models are compared by: nothing averages
      rounding errors out in these.

    Args:
        dtype: ``"auto"``, ``"float32"``, ``"bfloat16"``, ``"float16"``, or one of these of torch.
        model: the model, in its own dtype.
        device: where it is run.
        one_target: what is computed of a sample rests on one target, or is features, or predictions
            to compare.

    Raises:
        ValueError: neither ``"auto"`` nor float32, bfloat16 or float16.

    Example:
        >>> resolve_dtype("auto", nn.Linear(2, 2), torch.device("cpu"), one_target=True)
        torch.float32
    """
    if dtype == "auto":
        own_dtype = dtype_of(model)
        if one_target or own_dtype != torch.float32 or is_placed(model) or runs_as_it_is(model):
            return own_dtype
        return torch.bfloat16 if is_fast_at_bfloat16(device) else torch.float32
    named_dtype = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if named_dtype is None or named_dtype not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return named_dtype


def dtype_of(model: nn.Module) -> torch.dtype:
    """Return the dtype of a model's first floating parameter, float32 where it has none."""
    return next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)


def runs_as_it_is(model: nn.Module) -> bool:
    """Return whether a model's parts expect the dtypes that they have: it is quantised, or mixed.

    Whoever gave parts of a model other dtypes converts between them in its `forward`, and a
    quantised layer multiplies in the dtype that it was made for.
    """
    parameters = [p for p in model.parameters() if p.is_floating_point()]
    if len({p.dtype for p in parameters}) > 1:
        return True
    tensors = [*model.parameters(), *model.buffers()]
    if any(not isinstance(t, Tensor) or _is_quantised(t) for t in tensors):
        return True
    return any("quantized" in type(module).__module__ for module in model.modules())


def _is_quantised(tensor: Tensor) -> bool:
    # Libraries of quantised weights make tensors of classes of their own, which look floating; a
    # weight of integers is another kind.
    is_plain = type(tensor.data) in (Tensor, nn.Parameter) and type(tensor) in (
        Tensor,
        nn.Parameter,
    )
    is_weight = isinstance(tensor, nn.Parameter) and not tensor.is_floating_point()
    return (not is_plain and not hasattr(tensor, "full_tensor")) or is_weight


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones.

    A GPU is from compute capability 8.0 on, a CPU with AMX or AVX512-BF16.
    """
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def has_memory_for_copy(model: nn.Module, dtype: torch.dtype, device: torch.device) -> bool:
    """Return whether a copy of a model takes at most half of the memory that a device has free."""
    size = dtype.itemsize * sum(p.numel() for p in model.parameters() if p.dtype != dtype)
    if device.type == "cuda":
        return size < torch.cuda.mem_get_info(device)[0] / 2
    try:
        lines = Path("/proc/meminfo").read_text().splitlines()
    except OSError:
        return size < 2**33  # not Linux: 8 GiB are a guess
    free_kib = next(int(line.split()[1]) for line in lines if line.startswith("MemAvailable"))
    return size < free_kib * 1024 / 2


@contextmanager
def without_autocast(device: torch.device) -> Iterator[None]:
    """Let the dtypes of tensors alone decide in a block, within autocast as well.

    ``torch.set_float32_matmul_precision("medium")`` lets a CPU multiply float32 numbers as bfloat16
    ones, whose rounding would be taken for a fault: it does not reach into the block either.
    """
    is_available = torch.amp.is_autocast_available(device.type)
    precision = torch.get_float32_matmul_precision()
    if precision == "medium":
        torch.set_float32_matmul_precision("high")  # a GPU's is the same as by "medium"
    try:
        with torch.autocast(device.type, enabled=False) if is_available else nullcontext():
            yield
    finally:
        if precision == "medium":
            torch.set_float32_matmul_precision(precision)


@contextmanager
def forwards_without_autocast(model: nn.Module) -> Iterator[None]:
    """Let a model run as it did before Accelerate prepared it for mixed precision, for a block.

    Accelerate, and with it Hugging Face's Trainer, puts an autocast and a conversion of outputs to
    float32 around the `forward` of a model that it trains, and leaves them there.

    Args:
        model: the model, or one that holds it.
    """
    prepared = [each for each in model.modules() if _is_prepared(vars(each).get("forward"))]
    forwards = [module.forward for module in prepared]
    try:
        for module, forward in zip(prepared, forwards, strict=True):
            own: Any = forward
            while _is_prepared(own):
                own = own.__wrapped__.__wrapped__.__wrapped__  # of the conversion, of the autocast
            module.forward = MethodType(own, module) if isinstance(forward, MethodType) else own
        yield
    finally:
        for module, forward in zip(prepared, forwards, strict=True):
            module.forward = forward


def _is_prepared(forward: Any) -> bool:
    """Whether a forward is one that Accelerate has put around another."""
    return type(getattr(forward, "__wrapped__", None)).__name__ == "ConvertOutputsToFp32"


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name as a user writes it."""
    return str(dtype).removeprefix("torch.")
