"""Checksums of tensors: their bits reduced where they are, 8 bytes for every 64 KiB."""

from __future__ import annotations

import functools
import re
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

_WORDS = 1 << 14  # 4-byte words that one checksum covers: 64 KiB


def plain_tensors(tensor: Tensor) -> Iterator[tuple[list[Any], Tensor]]:
    """Yield the strided tensors that a tensor is made of, each with a description of its place.

    A quantized tensor of torchao is a class of its own, which holds integers and scales.
    """
    tensor = tensor.detach()
    if hasattr(tensor, "full_tensor"):  # a sharded DTensor: every rank sees the whole
        tensor = tensor.full_tensor()
    kind = [str(tensor.dtype), list(tensor.shape)]
    if hasattr(tensor, "__tensor_flatten__"):
        names, settings = tensor.__tensor_flatten__()
        settings_text = re.sub(r"0x[0-9a-f]+|device\([^)]*\)", "", str(settings))
        for name in names:
            for inner_kind, inner in plain_tensors(getattr(tensor, name)):
                yield [type(tensor).__qualname__, *kind, settings_text, name, *inner_kind], inner
    elif tensor.is_quantized:
        scales = re.sub(r"^tensor\(.*\], size", "size", repr(tensor), flags=re.DOTALL)
        yield [*kind, re.sub(r"device='[^']*',? ?", "", scales)], tensor.int_repr()
    elif tensor.layout != torch.strided:
        yield [*kind, str(tensor.layout)], tensor.to_dense()
    else:
        yield kind, tensor


def checksums_of(tensor: Tensor) -> Tensor:
    """The checksums of a tensor's bits, one for every 64 KiB: (ceil(bytes / 64 KiB),) int64.

        octets     |---- 64 KiB ----|---- 64 KiB ----|-- rest --0 0 0|
                     words w_0 … w_16383, 4 bytes each
        checksum     Σ w_i · m_i    with fixed odd multipliers m_i

    An odd number has an inverse modulo 2^32, so another w_i gives another w_i · m_i: no change of
    a single word is lost. The multipliers differ, so that swapped words are noticed too.
    """
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    row_bytes = 4 * _WORDS
    rest_bytes = octets.numel() % row_bytes
    whole, rest = octets.split([octets.numel() - rest_bytes, rest_bytes])
    padded_rest = nn.functional.pad(rest, (0, -rest_bytes % row_bytes))
    multipliers = _multipliers(str(octets.device))
    # One row at a time stays in a core's cache; a GPU wants many.
    rows = whole.view(torch.int32).view(-1, _WORDS).split(1024 if octets.is_cuda else 1)
    last_row = padded_rest.view(torch.int32).view(-1, _WORDS)
    # Two neighbouring products are added up as one 8-byte number, which spares a conversion of
    # each to 8 bytes. They still fill bits of their own, so a changed product changes the sum.
    return torch.cat([(part * multipliers).view(torch.int64).sum(1) for part in (*rows, last_row)])


@functools.lru_cache(maxsize=8)  # devices
def _multipliers(device: str) -> Tensor:
    """The multipliers of a checksum on a device: (_WORDS,) int32, odd, the same everywhere."""
    generator = np.random.Generator(np.random.PCG64(20250202))
    numbers = generator.integers(-(2**31), 2**31 - 1, _WORDS, dtype=np.int32)
    return torch.from_numpy(numbers | 1).to(device)
