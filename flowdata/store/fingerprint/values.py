"""Plain values fed into a digest: tensors, arrays, text, numbers, and containers of them."""

from __future__ import annotations

import dataclasses
import hashlib
import json
from collections.abc import Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor

_PLAIN = (str, bool, int, float, complex, bytes, bytearray, np.generic, np.ndarray, PurePath)


class NoContentError(TypeError):
    """A value whose content no rule covers; the error's text is the value's class."""


def update_digest(digest: hashlib._Hash, value: Any) -> None:
    """Feed one value's content into a digest.

    Its kind and size go in before its content, so that ``["a", "b"]`` and ``["ab", ""]``, or
    equal bytes of two dtypes, give different digests.

    Raises:
        NoContentError: no rule covers the value, or a value in it.
    """
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(canonical(["tensor", str(value.dtype), list(value.shape)]))
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(canonical(["array", value.dtype.str, list(value.shape)]))
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes | bytearray):
        digest.update(canonical(["bytes", len(value)]))
        digest.update(value)
    elif value is None or isinstance(value, str | int | float | complex | np.generic | PurePath):
        digest.update(canonical([type(value).__name__, str(value)]))
    elif isinstance(value, Mapping):
        digest.update(canonical(["mapping", len(value)]))
        for key in sorted(value, key=str):
            update_digest(digest, key)
            update_digest(digest, value[key])
    elif isinstance(value, Sequence | np.ndarray):
        digest.update(canonical(["sequence", len(value)]))
        for item in value:
            update_digest(digest, item)
    elif isinstance(value, Set):  # the order of a set changes from process to process
        update_digest(digest, sorted(map(repr, value)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        update_digest(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif is_picture(value):
        update_digest(digest, [value.mode, value.size, value.tobytes(), *palette_of(value)])
    else:
        raise NoContentError(class_name(value))


def is_plain(value: Any) -> bool:
    """Return whether a value holds no other objects: text, a number, bytes, a path, an array."""
    holds_objects = isinstance(value, np.ndarray) and value.dtype == object
    return isinstance(value, _PLAIN) and not holds_objects


def is_picture(value: Any) -> bool:
    """Return whether a value is an image of PIL, or has what a fingerprint reads of it."""
    return all(hasattr(value, name) for name in ("tobytes", "mode", "size"))


def palette_of(picture: Any) -> list[bytes]:
    """Return the colours that a picture's numbers stand for, in a list; it is empty for most."""
    return [bytes(picture.getpalette() or ())] if picture.mode in ("P", "PA") else []


def canonical(value: Any) -> bytes:
    """Return JSON with sorted keys and a line break, which keeps two values in a row apart."""
    return json.dumps(value, sort_keys=True, default=_text).encode() + b"\n"


def _text(value: Any) -> str:
    """What stands for a value that JSON has no form of; that of a tensor is cut, and rounded."""
    if not isinstance(value, Tensor | np.ndarray) or value.dtype == object:
        return str(value)
    digest = hashlib.sha256()
    update_digest(digest, value)
    return digest.hexdigest()


def class_name(value: Any) -> str:
    """Return the full name of a value's class."""
    return f"{type(value).__module__}.{type(value).__qualname__}"
