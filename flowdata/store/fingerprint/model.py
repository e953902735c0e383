"""The fingerprint of a model: what of it decides on its outputs.

In this order the digest takes: of every module its path, class, code, settings and hooks; the
configurations; of every parameter and buffer its name, dtype and shape; and at the end the
checksums of their values.
"""

from __future__ import annotations

import hashlib
from typing import Any

from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata.models.placement import whole_parameters
from flowdata.store.fingerprint.checksums import checksums_of, plain_tensors
from flowdata.store.fingerprint.hugging_face import stable_config
from flowdata.store.fingerprint.modules import (
    describe_module,
    global_hooks,
    is_filled_by_calls,
    walk,
)
from flowdata.store.fingerprint.objects import Describer
from flowdata.store.fingerprint.values import canonical

_MOST_GAPS = 8  # that a message names
_named_gaps: set[str] = set()  # by this program: a user need not read twice of one


def fingerprint_model(model: nn.Module, *, skip_adapters: bool = False) -> str:
    """Return the digest of a model's modules, settings, code, configuration and tensors.

    Tensors are reduced where they are, by a multiply-add checksum over their bits that no
    single changed bit can leave as it was; 8 bytes for every 64 KiB leave the device. What the
    digest can't hold is named through the logger, once.

    Args:
        model: any module; nothing in it is touched.
        skip_adapters: leave PEFT adapters out, so that the digest is that of the base model.
    """
    describer = new_describer()
    digest = _digest_of(describer, model, skip_adapters=skip_adapters)
    say_gaps("model", describer)
    return digest


def state_of(model: nn.Module) -> str:
    """Return the digest of `fingerprint_model` without a word on what it can't hold.

    It is for a comparison within one program, where that stays as it is.
    """
    return _digest_of(new_describer(), model, skip_adapters=False)


def new_describer() -> Describer:
    """Return a describer of objects that may hold modules."""
    return Describer(lambda describer, module: _digest_of(describer, module, skip_adapters=False))


def say_gaps(what: str, describer: Describer) -> None:
    """Name what a description could not hold, once for each program.

    Args:
        what: is described: ``"model"``, ``"function"``.
        describer: has described it.
    """
    gaps = [gap for gap in describer.gaps if gap not in _named_gaps]
    _named_gaps.update(gaps)
    if gaps:
        more = f" and {len(gaps) - _MOST_GAPS} more" if len(gaps) > _MOST_GAPS else ""
        logger.warning(
            f"the fingerprint of the {what} leaves out {', '.join(gaps[:_MOST_GAPS])}{more}: a "
            "change of these alone goes unnoticed, so use another store after one"
        )


def _digest_of(describer: Describer, model: nn.Module, *, skip_adapters: bool) -> str:
    modules = list(walk(model, skip_adapters=skip_adapters))
    describer.place_modules(modules)
    digest = hashlib.sha256()
    for hook in global_hooks():
        digest.update(canonical(describer.describe(hook, "a hook of all modules")))
    configurations: set[int] = set()
    for path, module in modules:
        digest.update(canonical(describe_module(describer, path, module)))
        config: Any = getattr(module, "config", None)
        if config is not None and hasattr(config, "to_dict") and id(config) not in configurations:
            configurations.add(id(config))
            digest.update(canonical(stable_config(config.to_dict())))
    checksums: list[Tensor] = []
    for name, module, attribute in sorted(_tensors(describer, modules), key=lambda entry: entry[0]):
        # A tensor that accelerate has offloaded is on no device until its module fetches it;
        # only then does the attribute hold values.
        with whole_parameters(module):
            for kind, tensor in plain_tensors(getattr(module, attribute)):
                digest.update(canonical([name, *kind]))
                checksums.append(checksums_of(tensor))
    # Reading a checksum waits for the device, so it is done once all of them are under way.
    for checksum in checksums:
        digest.update(checksum.cpu().numpy().tobytes())
    return digest.hexdigest()


def _tensors(
    describer: Describer, modules: list[tuple[str, nn.Module]]
) -> list[tuple[str, nn.Module, str]]:
    """Every parameter and buffer: its full name, its module, and its name there.

    A tied tensor stands under each of its names, since an offloaded one is no longer the same
    object there.
    """
    return [
        (f"{path}.{name}" if path else name, module, name)
        for path, module in modules
        for store in (module._parameters, module._buffers)
        for name, tensor in store.items()
        if tensor is not None
        and not (
            name in module._non_persistent_buffers_set
            and is_filled_by_calls(describer, module, name)
        )
    ]
