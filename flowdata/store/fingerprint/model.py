"""The fingerprint of a model: what of it decides on its outputs.

In this order the digest takes: the model's class; of every module its path, class, `extra_repr`
and settings; the configuration; of every parameter and buffer its name, dtype and shape; and at
the end the checksums of their values.
"""

from __future__ import annotations

import functools
import hashlib
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from flowdata.models.placement import whole_parameters
from flowdata.store.fingerprint.values import canonical

_WORDS = 1 << 14  # 4-byte words that one checksum covers: 64 KiB
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
    digest = hashlib.sha256(canonical(_module_class(model)))
    if not skip_adapters:
        for path, module in model.named_modules():
            description = [path, _module_class(module), module.extra_repr(), *_settings(module)]
            digest.update(canonical(description))
    config = getattr(model, "config", None)
    if config is not None and hasattr(config, "to_dict"):
        digest.update(canonical(_stable_config(config.to_dict())))
    adapters = set(getattr(model, "peft_config", {})) if skip_adapters else set()
    checksums: list[Tensor] = []
    tensors = dict(sorted([*model.named_parameters(), *model.named_buffers()]))
    for name, tensor in tensors.items():
        if adapters.isdisjoint(name.split(".")):
            digest.update(canonical([name, str(tensor.dtype), list(tensor.shape)]))
            path, _, attribute = name.rpartition(".")
            module = model.get_submodule(path)
            # A tensor that accelerate has offloaded is on no device until its module fetches it;
            # only then does the attribute hold values.
            with whole_parameters(module):
                checksums.append(_checksums(getattr(module, attribute).detach()))
    # Reading a checksum waits for the device, so it is done once all of them are under way.
    for checksum in checksums:
        digest.update(checksum.cpu().numpy().tobytes())
    return digest.hexdigest()


def _settings(module: nn.Module) -> list[Any]:
    """A module's settings that neither its class nor its `extra_repr` tells.

    Of an adapter layer they are which adapters act and how strongly; of a user's own module, the
    public attributes that hold a number, a truth value or text.
    """
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
        and name != "training"  # the scorer sets it
        and "checkpointing" not in name  # scoring makes no gradients that it could save memory for
    )


def _module_class(module: nn.Module) -> str:
    """The full name of a module's class.

    FSDP2 replaces the class by one of its own, which has `set_reshard_after_forward` and the
    original class as its last base; sharding must not change the fingerprint.
    """
    kind = type(module)
    original = kind.__bases__[-1] if hasattr(kind, "set_reshard_after_forward") else kind
    return f"{original.__module__}.{original.__qualname__}"


def _stable_config(config: dict[str, Any]) -> dict[str, Any]:
    """A configuration without the entries that say where it came from or how it is run."""
    return {
        str(key): _stable_config(value) if isinstance(value, dict) else value
        for key, value in config.items()
        if not str(key).startswith("_") and key not in _VOLATILE_CONFIG
    }


def _checksums(tensor: Tensor) -> Tensor:
    """The checksums of a tensor's bits, one for every 64 KiB: (ceil(bytes / 64 KiB),) int64.

        octets     |---- 64 KiB ----|---- 64 KiB ----|-- rest --0 0 0|
                     words w_0 … w_16383, 4 bytes each
        checksum     Σ w_i · m_i    with fixed odd multipliers m_i

    An odd number has an inverse modulo 2^32, so another w_i gives another w_i · m_i: no change of
    a single word is lost. The multipliers differ, so that swapped words are noticed too.
    """
    if hasattr(tensor, "full_tensor"):  # a sharded DTensor: every rank sees the whole
        tensor = tensor.full_tensor()
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
