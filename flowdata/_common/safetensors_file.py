"""The bytes of a safetensors file, for files that are written piece by piece.

    | length: 8 bytes | header: JSON of so many bytes | the tensors' bytes … |

The library `safetensors` makes a whole file in memory, or renames a draft of its own that only its
owner may read; its `load_file` and `safe_open` read what is written here.
"""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

_DTYPES = {
    torch.float64: "F64",
    torch.float32: "F32",
    torch.float16: "F16",
    torch.bfloat16: "BF16",
    torch.int64: "I64",
    torch.int32: "I32",
    torch.int16: "I16",
    torch.int8: "I8",
    torch.uint64: "U64",
    torch.uint32: "U32",
    torch.uint16: "U16",
    torch.uint8: "U8",
    torch.bool: "BOOL",
    torch.complex64: "C64",
    torch.float8_e8m0fnu: "F8_E8M0",
    torch.float8_e4m3fn: "F8_E4M3",
    torch.float8_e5m2: "F8_E5M2",
    torch.float8_e4m3fnuz: "F8_E4M3FNUZ",
    torch.float8_e5m2fnuz: "F8_E5M2FNUZ",
}


def header_of(tensors: Mapping[str, Tensor], metadata: Mapping[str, str]) -> bytes:
    """Return all that stands before the tensors' bytes, which follow in the order of `tensors`.

    Args:
        tensors: of any device and layout; only their names, dtypes and shapes are read.
        metadata: texts by name.

    Raises:
        ValueError: a dtype that safetensors can't hold.

    Example:
        >>> header_of({"loss": torch.zeros(2)}, {})[8:]
        b'{"__metadata__":{},"loss":{"dtype":"F32","shape":[2],"data_offsets":[0,8]}}     '
    """
    header: dict[str, Any] = {"__metadata__": dict(metadata)}
    end = 0
    for name, tensor in tensors.items():
        if tensor.dtype not in _DTYPES:
            raise ValueError(f"{name!r} is {tensor.dtype}, which safetensors can't hold")
        start, end = end, end + tensor.nbytes
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [start, end],
        }
    # As the library writes it, so that both make the same bytes.
    text = json.dumps(header, ensure_ascii=False, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)  # the data start at a multiple of 8, as readers map them
    return len(text).to_bytes(8, "little") + text


def octets(tensor: Tensor) -> memoryview:
    """Return the bytes of a contiguous tensor on the CPU, without a copy."""
    if tensor.numel() == 0:
        return memoryview(b"")
    return tensor.reshape(-1).view(torch.uint8).numpy().data
