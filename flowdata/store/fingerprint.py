"""Content fingerprints: what a store compares before it trusts losses computed earlier.

A fingerprint depends on content alone: not on addresses, file names, devices or the process.
All of them are hex SHA-256 digests.
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import types
from collections.abc import Callable, Mapping, Sequence, Set
from pathlib import PurePath
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.utils.data import Dataset, TensorDataset

from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.models.placement import whole_parameters

_SAMPLED_ITEMS = 512  # of a data set that only code can read; see fingerprint_dataset
_ARROW_ROWS = 4096  # rows of a Hugging Face data set that are in memory at a time
_WORDS = 1 << 14  # 4-byte words that one checksum covers
_LIBRARIES = ("torch", "transformers", "peft")
_VOLATILE_CONFIG = ("transformers_version", "dtype", "torch_dtype", "use_cache")


def fingerprint_model(model: nn.Module, *, skip_adapters: bool = False) -> str:
    """Return the digest of a model's modules, settings, configuration, parameters and buffers.

    Tensors are reduced where they are, by a multiply-add checksum over their bits that no
    single changed bit can leave as it was; 8 bytes for every 64 KiB leave the device.

    Args:
        model: any module; nothing in it is touched.
        skip_adapters: leave PEFT adapters out, so that the digest is that of the base model.
    """
    digest = hashlib.sha256(_canonical(_module_class(model)))
    if not skip_adapters:
        for path, module in model.named_modules():
            told = [path, _module_class(module), module.extra_repr(), *_settings(module)]
            digest.update(_canonical(told))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(_canonical(_stable_config(config.to_dict())))
    adapters = set(getattr(model, "peft_config", {})) if skip_adapters else set()
    sums: list[Tensor] = []
    tensors = dict(sorted([*model.named_parameters(), *model.named_buffers()]))
    for name, tensor in tensors.items():
        if adapters.isdisjoint(name.split(".")):
            digest.update(_canonical([name, str(tensor.dtype), list(tensor.shape)]))
            path, _, own = name.rpartition(".")
            owner = model.get_submodule(path)
            with whole_parameters(owner):  # what accelerate has offloaded is on no device
                sums.append(_checksums(getattr(owner, own).detach()))
    for part in sums:  # only now is the device waited for
        digest.update(part.cpu().numpy().tobytes())
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[Any]:
    """What else decides on a module's outputs: which adapters act and how, a user's own numbers."""
    active = getattr(module, "active_adapters", None)
    if isinstance(active, str | list | tuple):  # of a layer; a transformers model has a method
        return [active, bool(module.disable_adapters), str(getattr(module, "scaling", None))]
    if _module_class(module).partition(".")[0] in _LIBRARIES:
        return []  # their extra_repr or configuration says it
    return sorted(
        [name, value]
        for name, value in vars(module).items()
        if isinstance(value, bool | int | float | str)
        and not name.startswith("_")
        and name != "training"
        and "checkpointing" not in name  # gradients are not made here
    )


def fingerprint_dataset(dataset: Any, *, skip_unreadable: bool = False) -> str:
    """Return the digest of a map-style data set's length and content.

    Tensor data sets, Arrow tables of Hugging Face data sets (their rows before any transform)
    and lists are read whole. Of any other data set at most 512 samples, evenly spread from the
    first to the last, are read through `__getitem__`, with the random generators seeded alike
    each time, so that random transforms give the same digest again.

    Args:
        dataset: map-style.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Raises:
        TypeError: a sample holds something without stable content; pass `dataset_id`.
        SampleError: the data set raises on a sample.
    """
    length = len(dataset)
    digest = hashlib.sha256(_canonical([_dataset_kind(dataset), length]))
    if isinstance(dataset, TensorDataset):
        for tensor in dataset.tensors:
            update_digest(digest, tensor)
    elif hasattr(dataset, "with_format") and hasattr(dataset, "column_names"):
        _update_from_arrow(digest, dataset)
    else:
        whole = isinstance(dataset, list | tuple) or length <= _SAMPLED_ITEMS
        wanted = range(length) if whole else np.linspace(0, length - 1, _SAMPLED_ITEMS).astype(int)
        samples = Readable(dataset, skip=skip_unreadable)
        with preserved_rng(seed=0):
            for index in wanted:
                sample = samples[int(index)]
                try:
                    update_digest(digest, None if isinstance(sample, Unreadable) else sample)
                except _NoContentError as error:
                    raise TypeError(
                        f"dataset[{index}] holds a {error}, whose content can't be "
                        "fingerprinted; pass dataset_id='a name that changes when the data does'"
                    ) from None
    return digest.hexdigest()


def fingerprint_callable(function: Callable[..., Any] | None) -> str:
    """Return the digest of what a function does: its code, defaults and captured values."""
    digest = hashlib.sha256()
    _update_from_callable(digest, function)
    return digest.hexdigest()


def update_digest(digest: hashlib._Hash, value: Any) -> None:
    """Feed one value's content, with its type and shape, into a digest."""
    if isinstance(value, Tensor):
        value = value.detach().cpu().contiguous()
        digest.update(_canonical(["tensor", str(value.dtype), list(value.shape)]))
        if value.numel():
            digest.update(value.reshape(-1).view(torch.uint8).numpy().data)
    elif isinstance(value, np.ndarray) and value.dtype != object:
        digest.update(_canonical(["array", value.dtype.str, list(value.shape)]))
        digest.update(np.ascontiguousarray(value).tobytes())
    elif isinstance(value, bytes | bytearray):
        digest.update(_canonical(["bytes", len(value)]))
        digest.update(value)
    elif value is None or isinstance(value, str | int | float | complex | np.generic | PurePath):
        digest.update(_canonical([type(value).__name__, str(value)]))
    elif isinstance(value, Mapping):
        digest.update(_canonical(["mapping", len(value)]))
        for key in sorted(value, key=str):
            update_digest(digest, key)
            update_digest(digest, value[key])
    elif isinstance(value, Sequence | np.ndarray):
        digest.update(_canonical(["sequence", len(value)]))
        for item in value:
            update_digest(digest, item)
    elif isinstance(value, Set):
        update_digest(digest, sorted(map(repr, value)))
    elif dataclasses.is_dataclass(value) and not isinstance(value, type):
        update_digest(digest, {f.name: getattr(value, f.name) for f in dataclasses.fields(value)})
    elif hasattr(value, "tobytes") and hasattr(value, "mode") and hasattr(value, "size"):
        update_digest(digest, [value.mode, value.size, value.tobytes()])  # a PIL image
    else:
        raise _NoContentError(_class_name(value))


class _NoContentError(TypeError):
    """A value whose content no rule covers; its text is the value's class."""


def _canonical(value: Any) -> bytes:
    return json.dumps(value, sort_keys=True, default=str).encode() + b"\n"


def _class_name(value: Any) -> str:
    return f"{type(value).__module__}.{type(value).__qualname__}"


def _module_class(module: nn.Module) -> str:
    """A module's class; FSDP2 puts one of its own before it."""
    kind = type(module)
    own = kind.__bases__[-1] if hasattr(kind, "set_reshard_after_forward") else kind
    return f"{own.__module__}.{own.__qualname__}"


def _dataset_kind(dataset: Any) -> str:
    """The class for a torch data set, one word for everything else that can be indexed."""
    return _class_name(dataset) if isinstance(dataset, Dataset) else "sequence"


def _stable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without what says where it came from or how it is run."""
    return {
        str(key): _stable_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _VOLATILE_CONFIG
    }


def _checksums(tensor: Tensor) -> Tensor:
    """(ceil(bytes / 64 KiB),) int64: of each row, Σ over pairs of (word · odd number mod 2^32)."""
    if hasattr(tensor, "full_tensor"):  # a sharded DTensor: every rank sees the whole
        tensor = tensor.full_tensor()
    octets = tensor.contiguous().reshape(-1).view(torch.uint8)
    size = 4 * _WORDS
    whole, rest = octets.split([octets.numel() // size * size, octets.numel() % size])
    last = nn.functional.pad(rest, (0, -rest.numel() % size))
    multipliers = _multipliers(str(octets.device))
    # One row at a time stays in a core's cache; a GPU wants many.
    rows = whole.view(torch.int32).view(-1, _WORDS).split(1 if not octets.is_cuda else 1024)
    last_row = last.view(torch.int32).view(-1, _WORDS)
    # Summed as pairs of words: no conversion, and still no changed bit is lost.
    return torch.cat([(part * multipliers).view(torch.int64).sum(1) for part in (*rows, last_row)])


@functools.lru_cache(maxsize=8)
def _multipliers(device: str) -> Tensor:
    drawn = np.random.Generator(np.random.PCG64(20250202)).integers(
        -(2**31), 2**31 - 1, _WORDS, dtype=np.int32
    )
    return torch.from_numpy(drawn | 1).to(device)


def _update_from_arrow(digest: hashlib._Hash, dataset: Any) -> None:
    rows = dataset.with_format("arrow")
    for start in range(0, len(dataset), _ARROW_ROWS):
        table = rows[start : start + _ARROW_ROWS]
        for name in sorted(table.column_names):
            digest.update(_canonical(name))
            _update_from_array(digest, table[name].combine_chunks())


def _update_from_array(digest: hashlib._Hash, array: Any) -> None:
    """Feed an Arrow array into a digest by value: its chunks and buffers may lie anyhow."""
    import pyarrow as pa

    kind = array.type
    digest.update(_canonical([str(kind), len(array), array.null_count]))
    if array.null_count:
        update_digest(digest, array.is_null().to_numpy(zero_copy_only=False))
        array = array.drop_null()
    if pa.types.is_struct(kind):
        for field, values in zip(kind, array.flatten(), strict=True):
            digest.update(_canonical(field.name))
            _update_from_array(digest, values)
    elif pa.types.is_list(kind) or pa.types.is_large_list(kind):
        update_digest(digest, array.value_lengths().to_numpy(zero_copy_only=False))
        _update_from_array(digest, array.flatten())
    elif pa.types.is_primitive(kind):
        update_digest(digest, array.to_numpy(zero_copy_only=False))
    else:  # strings, bytes and whatever is rare
        update_digest(digest, array.to_pylist())


def _update_from_callable(digest: hashlib._Hash, function: Any) -> None:
    if isinstance(function, functools.partial):
        for part in (function.func, *function.args, *sorted(function.keywords.items())):
            _update_from_value(digest, part)
    elif isinstance(function, types.MethodType):
        _update_from_value(digest, function.__self__)
        _update_from_callable(digest, function.__func__)
    elif isinstance(function, types.FunctionType):
        digest.update(_canonical(function.__qualname__))
        _update_from_code(digest, function.__code__)
        captured = [cell.cell_contents for cell in function.__closure__ or ()]
        for value in (*(function.__defaults__ or ()), *captured):
            _update_from_value(digest, value)
    else:
        _update_from_value(digest, function)


def _update_from_code(digest: hashlib._Hash, code: types.CodeType) -> None:
    digest.update(code.co_code)
    digest.update(_canonical([code.co_names, code.co_varnames]))
    for constant in code.co_consts:
        if isinstance(constant, types.CodeType):
            _update_from_code(digest, constant)
        else:  # a frozenset's order changes from process to process
            text = sorted(map(repr, constant)) if isinstance(constant, Set) else repr(constant)
            digest.update(_canonical(text))


def _update_from_value(digest: hashlib._Hash, value: Any) -> None:
    """A captured value: its content where it has one, else its class and plain attributes."""
    if isinstance(value, types.FunctionType | types.MethodType | functools.partial):
        _update_from_callable(digest, value)
    elif isinstance(value, nn.Module):
        digest.update(fingerprint_model(value).encode())
    elif hasattr(value, "chat_template") and hasattr(value, "get_vocab"):
        update_digest(digest, fingerprint_tokenizer(value))
    else:
        try:
            update_digest(digest, value)
        except _NoContentError as error:
            digest.update(_canonical(str(error)))
            for name, attribute in sorted(getattr(value, "__dict__", {}).items()):
                if isinstance(attribute, str | int | float | bool | None) or hasattr(
                    attribute, "get_vocab"
                ):
                    digest.update(_canonical(name))
                    _update_from_value(digest, attribute)


def fingerprint_tokenizer(tokenizer: Any) -> str:
    """Return the digest of a Hugging Face tokenizer: its rules, vocabulary and chat template."""
    vocabulary = sorted(tokenizer.get_vocab().items())
    rules = tokenizer.backend_tokenizer.to_str() if tokenizer.is_fast else None
    special = {name: str(token) for name, token in tokenizer.special_tokens_map.items()}
    content = [_class_name(tokenizer), vocabulary, rules, tokenizer.chat_template, special]
    return hashlib.sha256(_canonical(content)).hexdigest()
