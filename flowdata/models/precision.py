"""Precision: which dtype a model is scored in, and a copy of the model that has it."""

from __future__ import annotations

import torch
from torch import nn

DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}


def resolve_dtype(dtype: str | torch.dtype, model: nn.Module, device: torch.device) -> torch.dtype:
    """Return the dtype to score in.

    ``"auto"`` is bfloat16 where the device is fast at it (AMX or AVX512-BF16 on a CPU, compute
    capability 8.0 on a GPU), else the model's own dtype.

    Raises:
        ValueError: neither ``"auto"`` nor float32, bfloat16 or float16.
    """
    if dtype == "auto":
        own = next((p.dtype for p in model.parameters() if p.is_floating_point()), torch.float32)
        return torch.bfloat16 if own == torch.float32 and is_fast_at_bfloat16(device) else own
    chosen = DTYPES.get(dtype) if isinstance(dtype, str) else dtype
    if chosen is None or chosen not in DTYPES.values():
        raise ValueError(f"dtype must be 'auto' or one of {', '.join(DTYPES)}, got {dtype!r}")
    return chosen


def is_fast_at_bfloat16(device: torch.device) -> bool:
    """Return whether the device multiplies bfloat16 matrices faster than float32 ones."""
    if device.type == "cuda":
        return torch.cuda.get_device_capability(device) >= (8, 0)
    if device.type == "cpu":
        return bool(torch.cpu._is_amx_tile_supported() or torch.cpu._is_avx512_bf16_supported())
    return False


def name_of(dtype: torch.dtype) -> str:
    """Return the dtype's name as a user writes it."""
    return str(dtype).removeprefix("torch.")
