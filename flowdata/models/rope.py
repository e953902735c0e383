"""Rotary frequencies that depend on the length of a call, as in LongRoPE and dynamic NTK scaling.

Such a model gives a sample other losses beside a longer one than alone, and dynamic NTK remembers
the longest call so far. Up to a length all is as ever; beyond it a sample has to be run alone, with
the frequencies that the model was loaded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def longest_alike(model: nn.Module) -> int | None:
    """Return the tokens up to which frequencies don't depend on a call's length; None: always."""
    lengths = [
        _longest_alike(module, layer)
        for module in _rotary_modules(model)
        for layer, kind in _kinds(module).items()
        if "dynamic" in kind or kind == "longrope"
    ]
    return min(lengths, default=None)


@contextmanager
def loaded_frequencies(model: nn.Module) -> Iterator[None]:
    """Let a model forget the lengths that it has seen; what it knew then is put back."""
    modules = [module for module in _rotary_modules(model) if longest_alike(module) is not None]
    before = [(module, _state(module), _buffers(module)) for module in modules]
    for module in modules:
        _forget(module)
    try:
        yield
    finally:
        for module, state, buffers in before:
            _put_back(module, state, buffers)


def _rotary_modules(model: nn.Module) -> list[Any]:
    return [module for module in model.modules() if hasattr(module, "original_max_seq_len")]


def _kinds(rotary: Any) -> dict[str, str]:
    """The kind of scaling by kind of layer, or of "" where all layers have one."""
    kinds = getattr(rotary, "rope_type", "default")
    return dict(kinds) if isinstance(kinds, dict) else {"": kinds}


def _longest_alike(rotary: Any, layer: str) -> int:
    if "dynamic" in _kinds(rotary)[layer]:
        return int(rotary.original_max_seq_len)
    parameters = rotary.config.rope_parameters
    return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _state(rotary: Any) -> dict[str, Any]:
    return {name: value for name, value in vars(rotary).items() if not name.startswith("_")}


def _buffers(rotary: Any) -> dict[str, Tensor]:
    return dict(rotary.named_buffers(recurse=False))


def _forget(rotary: Any) -> None:
    """Go back to the loaded frequencies, in copies: the model may write into them."""
    _register(rotary, {name: tensor.clone() for name, tensor in _buffers(rotary).items()})
    for layer in _kinds(rotary):
        prefix = f"{layer}_" if layer else ""
        loaded = getattr(rotary, f"{prefix}original_inv_freq")
        _register(rotary, {f"{prefix}inv_freq": loaded.clone()})
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _put_back(rotary: Any, state: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    for name in _state(rotary).keys() - state.keys():
        delattr(rotary, name)
    for name, value in state.items():
        setattr(rotary, name, value)
    _register(rotary, buffers)


def _register(rotary: Any, buffers: dict[str, Tensor]) -> None:
    for name, tensor in buffers.items():
        rotary.register_buffer(name, tensor, persistent=False)
