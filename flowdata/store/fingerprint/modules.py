"""What of a module decides on its outputs, beside its tensors: class, settings, code and hooks.

A description is the same for a model that is sharded, compiled, offloaded or trained, before a
forward pass and after it.
"""

from __future__ import annotations

import functools
import re
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.store.fingerprint.code import (
    cached_properties,
    home_of,
    is_of_library,
    names_read_by,
)
from flowdata.store.fingerprint.instructions import below, only_watches
from flowdata.store.fingerprint.objects import Describer

# Wrappers that run a module otherwise and compute the same: torch.compile, FSDP, checkpointing.
_WRAPPED = ("_orig_mod", "_fsdp_wrapped_module", "_checkpoint_wrapped_module")
_PARALLEL = (nn.parallel.DistributedDataParallel, nn.DataParallel)
_BASE_OF_ADAPTER = {"base_model", "model", "base_layer", "original_module"}  # PEFT's words for it
_INTERNAL = frozenset(vars(nn.Module()))
# Attributes that say how a model is run, where it came from, or how it generates text.
_VOLATILE = {
    *("training", "device", "device_map", "hf_device_map", "name_or_path", "warnings_issued"),
    *("to", "cuda", "npu", "xpu", "mlu", "musa", "sdaa"),  # which accelerate puts a warning around
    *("generation_config", "config", "quantization_config", "hf_quantizer", "model_tags"),
}
_FORWARDS = {"forward", "_old_forward", "_original_forward", "_forward_hooks", "_loss_function"}
# Methods of the user's own modules that train, log or load, as Lightning names them.
_TRAINING = {
    *("training_step", "validation_step", "test_step", "predict_step", "configure_optimizers"),
    *("configure_callbacks", "optimizer_step", "optimizer_zero_grad", "lr_scheduler_step"),
    *("backward", "setup", "teardown", "prepare_data", "train_dataloader", "val_dataloader"),
    *("test_dataloader", "predict_dataloader", "extra_repr", "state_dict", "load_state_dict"),
    *("from_pretrained", "save_pretrained", "train", "_init_weights", "__setattr__"),
}
# Packages whose hooks move tensors, gather parameters or record outputs, and change no value.
_HOOKS_OF_RUNNING = ("accelerate", "transformers", "peft", "flowdata", "wandb", "lightning")
_HOOKS_OF_SHARDING = ("torch.distributed", "torch._dynamo", "torch.utils.checkpoint")
_SCALARS = (bool, int, float, str, types.FunctionType, types.BuiltinFunctionType)


def walk(model: nn.Module, *, skip_adapters: bool = False) -> Iterator[tuple[str, nn.Module]]:
    """Yield every module inside a model once, with its path, wrappers looked through.

    Args:
        model: the model.
        skip_adapters: leave PEFT's own modules out.
    """
    queue, known = [("", model)], set()
    while queue:
        path, module = queue.pop()
        module = look_through(module)
        if id(module) in known:
            continue
        known.add(id(module))
        is_adapter = skip_adapters and is_of_peft(module)
        if not is_adapter:
            yield path, module
        for name, child in reversed(module._modules.items()):
            if child is not None and (not is_adapter or name in _BASE_OF_ADAPTER):
                queue.append((f"{path}.{name}" if path else name, child))


def look_through(module: nn.Module) -> nn.Module:
    """Return the module inside wrappers that only run it in another way."""
    inner = [module._modules[name] for name in _WRAPPED if name in module._modules]
    if isinstance(module, _PARALLEL):
        inner.append(module.module)
    return look_through(inner[0]) if inner and inner[0] is not None else module


def original_class(module: nn.Module) -> type:
    """Return a module's class.

    FSDP2 replaces the class by one of its own, which has `set_reshard_after_forward` and the
    original class as its last base; sharding must not change the fingerprint.
    """
    kind = type(module)
    return kind.__bases__[-1] if hasattr(kind, "set_reshard_after_forward") else kind


def is_of_peft(module: nn.Module) -> bool:
    """Return whether a module's class is PEFT's own."""
    return original_class(module).__module__.partition(".")[0] == "peft"


def describe_module(describer: Describer, path: str, module: nn.Module) -> list[Any]:
    """Return the description of one module without its children and its tensors."""
    kind, place = original_class(module), path or "the model"
    representation = re.sub(r"0x[0-9a-f]+|device='?[\w:]*'?", "", module.extra_repr())
    return [
        path,
        describer.of_module_class(kind, place, _TRAINING),
        representation,
        _settings(describer, module, kind, path),
        [describer.describe(hook, f"a hook of {place}") for hook in _hooks(module)],
        _packed_tensors(describer, module, place),
        *_compiled_code(module),
    ]


def _compiled_code(module: nn.Module) -> list[str]:
    """What a module does that `torch.jit` compiled, which no class tells."""
    if not isinstance(module, torch.jit.ScriptModule):
        return []
    graph = getattr(module, "inlined_graph", None)  # there is none without a `forward`
    # Neither places in files nor the numbers by which a process tells classes apart count.
    return [re.sub(r" *#[^\n]*|___torch_mangle_\d+\.?", "", str(graph))]


def is_filled_by_calls(describer: Describer, module: nn.Module, name: str) -> bool:
    """Return whether a forward pass fills an attribute or buffer of this name.

    Rotary positions of transformers do so where they grow with the sequence alone.
    """
    kind = original_class(module)
    rope = getattr(module, "rope_type", None)
    if rope is not None and is_of_library(kind.__module__):
        grows = any(word in str(rope) for word in ("dynamic", "longrope"))
        return grows and any(word in name for word in ("inv_freq", "cached", "attention_scaling"))
    if hasattr(module, "make_weights") and name == "weights":
        return True  # sinusoidal positions, which grow with the sequence
    return name in describer.filled(kind)


def _settings(describer: Describer, module: nn.Module, kind: type, path: str) -> list[Any]:
    """A module's attributes that decide on its outputs, by name.

    Of a module of the user's own they are all public ones, and the private ones that its methods
    read. Of a known package's module they are numbers, text and functions.
    """
    settings: dict[str, Any] = {}
    active = getattr(module, "active_adapters", None)
    # Of a layer; a transformers model has a method, and PEFT's wrapper of other models no switch.
    if isinstance(active, str | list | tuple) and hasattr(module, "disable_adapters"):
        scaling = str(getattr(module, "scaling", None))
        settings["adapters"] = [active, bool(module.disable_adapters), scaling]
    chooses, filled = _chooser(describer, module, kind), describer.filled(kind)
    computed = cached_properties(kind)
    for name, value in sorted(vars(module).items()):
        place = f"{path}.{name}" if path else name
        if name in _FORWARDS or name in computed:
            continue
        if name in _VOLATILE or name in _INTERNAL or "checkpointing" in name:
            continue
        if not chooses(name, value):
            continue
        if is_filled_by_calls(describer, module, name):
            if not is_of_library(kind.__module__):
                describer.gaps[f"{place} (forward fills it)"] = None
            continue
        settings[name] = describer.describe(value, place, filled=below(filled, name))
    for name in ("forward", "_loss_function"):
        function = _replaced(module, kind, name)
        if function is not None:
            settings[name] = describer.describe(function, f"{path}.{name}" if path else name)
    return [settings]


def _chooser(describer: Describer, module: nn.Module, kind: type) -> Callable[[str, Any], bool]:
    """The function that says which of a module's attributes count.

    A mark that somebody has put on a known package's module counts as little as no code reads it.
    """
    if is_of_library(kind.__module__):
        names = describer.names(kind)
        return lambda name, value: (
            (_is_scalar(value) and name in names and not name.startswith("_"))
            or _is_own_function(module, value)
        )
    names = names_read_by(kind)
    return lambda name, value: (
        not name.startswith(("_", "hf_")) or (name in names and not name.startswith("_hf"))
    )


def _is_scalar(value: Any) -> bool:
    if isinstance(value, tuple | list):
        return all(map(_is_scalar, value))
    return isinstance(value, _SCALARS)


def _is_own_function(module: nn.Module, value: Any) -> bool:
    """Whether a value is a function of the user's own, put in the place of a method."""
    if isinstance(value, types.MethodType):
        return value.__self__ is not module or not is_of_library(home_of(value.__func__))  # type: ignore[arg-type]
    return isinstance(value, types.FunctionType) and not is_of_library(home_of(value))


def _replaced(module: nn.Module, kind: type, name: str) -> Any:
    """The function that an instance has in the place of its class's, None where it has none.

    Accelerate and torch.compile put wrappers in the place of `forward`, which keep it.
    """
    if isinstance(module, torch.jit.ScriptModule):  # holds its own method there once it has run
        return None
    function = vars(module).get(name)
    own = getattr(kind, name, None)
    while function is not None and getattr(function, "__func__", function) is not own:
        code = getattr(function, "__func__", getattr(function, "func", function))
        home = home_of(code) if isinstance(code, types.FunctionType) else type(code).__module__
        if hasattr(function, "_torchdynamo_orig_callable"):
            function = function._torchdynamo_orig_callable
        elif home.partition(".")[0] in ("accelerate", "torch") and hasattr(function, "__wrapped__"):
            function = function.__wrapped__
        else:
            return function
    return None


def _hooks(module: nn.Module) -> list[Any]:
    """The hooks that may change a module's inputs or outputs, and don't only count or record."""
    hooks = [*module._forward_pre_hooks.values(), None, *module._forward_hooks.values()]
    return [hook for hook in hooks if hook is None or not _is_of_running(hook)]


def global_hooks() -> list[Any]:
    """Return the hooks of all modules of the program, as `torch.nn.modules.module` keeps them."""
    kept = nn.modules.module
    hooks = [*kept._global_forward_pre_hooks.values(), *kept._global_forward_hooks.values()]
    return [hook for hook in hooks if not _is_of_running(hook)]


def _is_of_running(hook: Any) -> bool:
    """Whether a hook belongs to how a model is run, or only watches it."""
    function = getattr(hook, "func", hook)  # inside a partial
    function = getattr(function, "__func__", function)
    is_function = isinstance(function, types.FunctionType)
    home = home_of(function) if is_function else type(function).__module__
    if home.partition(".")[0] in _HOOKS_OF_RUNNING or home.startswith(_HOOKS_OF_SHARDING):
        return True
    if not is_function or isinstance(hook, functools.partial):
        return False
    return only_watches(function, is_method=isinstance(hook, types.MethodType))


def _packed_tensors(describer: Describer, module: Any, place: str) -> Any:
    """The weights that a quantized module of torch.ao keeps outside its parameters."""
    if not hasattr(module, "_weight_bias"):
        return None
    tensors = [part for part in module._weight_bias() if isinstance(part, Tensor)]
    values = [t.dequantize() if t.is_quantized else t for t in tensors]
    return [describer.describe(value, place) for value in values]
