"""Rotary frequencies that depend on the length of a call, as in LongRoPE and dynamic NTK scaling.

Such a model gives a short sample other losses in one call with a long one than alone, and dynamic
NTK scaling remembers the longest call so far::

    tokens in a call   0 ──────────── longest_as_loaded ───────────────→
    frequencies        as loaded      │  stretched, by this call's or the longest call's length

Up to that length samples can be scored together. A longer sample is run alone, after the model has
gone back to the frequencies that it was loaded with.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor, nn


def longest_as_loaded(model: nn.Module) -> int | None:
    """Return how many tokens a call may have to run with the frequencies as loaded.

    None where that is any number, because frequencies don't depend on a call's length.
    """
    lengths = [
        _longest_as_loaded(module, layer)
        for module in _rotary_modules(model)
        for layer, kind in _kinds(module).items()
        if "dynamic" in kind or kind == "longrope"
    ]
    return min(lengths, default=None)


@contextmanager
def loaded_frequencies(model: nn.Module) -> Iterator[None]:
    """Give a model its frequencies as loaded for a block, as if it had not been called before.

    What the model remembered of its calls is put back at the end.
    """
    modules = [module for module in _rotary_modules(model) if longest_as_loaded(module) is not None]
    before = [(module, _attributes(module), _buffers(module)) for module in modules]
    for module in modules:
        _forget(module)
    try:
        yield
    finally:
        for module, attributes, buffers in before:
            _put_back(module, attributes, buffers)


def _rotary_modules(model: nn.Module) -> list[Any]:
    # The attribute is what tells the rotary embeddings of Hugging Face models from other modules.
    return [module for module in model.modules() if hasattr(module, "original_max_seq_len")]


def _kinds(rotary: Any) -> dict[str, str]:
    """The kind of scaling for each kind of layer; under "" where all layers have the same.

    Gemma 3 has several kinds of layers, whose buffers bear the kind as a prefix.
    """
    kinds = getattr(rotary, "rope_type", "default")
    return dict(kinds) if isinstance(kinds, dict) else {"": kinds}


def _longest_as_loaded(rotary: Any, layer: str) -> int:
    if "dynamic" in _kinds(rotary)[layer]:
        return int(rotary.original_max_seq_len)
    parameters = rotary.config.rope_parameters
    return int((parameters[layer] if layer else parameters)["original_max_position_embeddings"])


def _attributes(rotary: Any) -> dict[str, Any]:
    """What a module keeps beside its buffers, such as the longest call so far."""
    return {name: value for name, value in vars(rotary).items() if not name.startswith("_")}


def _buffers(rotary: Any) -> dict[str, Tensor]:
    return dict(rotary.named_buffers(recurse=False))


def _forget(rotary: Any) -> None:
    """Go back to the frequencies as loaded, in copies, since the model may write into them.

    Every buffer becomes a copy, so that those that `_put_back` registers again are untouched.
    """
    _register(rotary, {name: tensor.clone() for name, tensor in _buffers(rotary).items()})
    for layer in _kinds(rotary):
        prefix = f"{layer}_" if layer else ""
        loaded = getattr(rotary, f"{prefix}original_inv_freq")
        _register(rotary, {f"{prefix}inv_freq": loaded.clone()})
        setattr(rotary, f"{prefix}max_seq_len_cached", rotary.original_max_seq_len)


def _put_back(rotary: Any, attributes: dict[str, Any], buffers: dict[str, Tensor]) -> None:
    for name in _attributes(rotary).keys() - attributes.keys():  # first set during the block
        delattr(rotary, name)
    for name, value in attributes.items():
        setattr(rotary, name, value)
    _register(rotary, buffers)


def _register(rotary: Any, buffers: dict[str, Tensor]) -> None:
    for name, tensor in buffers.items():
        rotary.register_buffer(name, tensor, persistent=False)
