"""The processor: its kind, which figures are told with, and what it is fast at."""

from __future__ import annotations

import platform
from pathlib import Path

import torch

_EXTENSIONS = ("amx_bf16", "avx512_bf16")  # that decide how fast a CPU's bfloat16 is


def processor() -> str:
    """Return the GPU's name if there is one, or else the CPU's with its bfloat16 extensions."""
    if torch.cuda.is_available():
        return torch.cuda.get_device_name()
    return cpu()


def cpu() -> str:
    """Return the CPU's name and its bfloat16 extensions, such as ``AMD EPYC avx512_bf16``."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # only Linux has this file
        return platform.processor()
    fields = dict(line.split(":", 1) for line in lines if ":" in line)
    facts = {key.strip(): value.strip() for key, value in fields.items()}
    extensions = [name for name in _EXTENSIONS if name in facts.get("flags", "").split()]
    return " ".join([facts.get("model name", platform.processor()), *extensions])


def has_amx() -> bool:
    """Return whether the CPU has tiles for matrix products (Intel's AMX)."""
    return bool(torch.cpu._is_amx_tile_supported())


def has_bfloat16() -> bool:
    """Return whether the CPU multiplies in bfloat16, by AMX or by AVX-512's extension."""
    return has_amx() or bool(torch.cpu._is_avx512_bf16_supported())
