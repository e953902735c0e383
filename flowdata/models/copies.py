"""A frozen copy of a model in another dtype, on another device; or the model itself, frozen."""

from __future__ import annotations

import copy
import operator
import types
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from itertools import count
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.models.evaluation import as_it_was, without_training
from flowdata.models.layout import convolutions, run_channels_last
from flowdata.models.placement import is_placed
from flowdata.models.precision import (
    dtype_of,
    forwards_without_autocast,
    runs_as_it_is,
    without_autocast,
)
from flowdata.models.tensors import cloned, map_floating, map_tensors, tensors_in

_MOST_RESTORED = 2**20  # elements of a buffer: running statistics are small, quantised weights not


Kept = dict[tuple[torch.dtype, ...], frozenset[int]]  # by the dtypes of inputs, places


@contextmanager
def frozen_model(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
    """Give a model in eval mode, in a dtype and on a device, for a block without gradients.

    Where nothing has to be converted it is the caller's own model. Otherwise it is a copy, whose
    parameters are converted one by one: the caller's are never touched, and the copy takes only the
    memory of what had to be converted, and of the weights of convolutions in a second, faster
    layout. Floating inputs are converted to the dtype on the way in, where the model doesn't take
    them as they are, and a copy's outputs to float32 on the way out. An autocast around the block,
    such as that of a training loop, does not reach into it, and neither does one that Accelerate
    put around the model's forward.

    The caller's model is in eval mode as well, since functions that a copy took over from it may
    call its layers. Flags and running statistics are put back at the end.

    Args:
        model: the model, which comes back as it was.
        dtype: of parameters and floating buffers, but those that need float32's mantissa.
        device: where the model is to be.

    Raises:
        ValueError: the model has to be converted, and it can't be copied.
    """
    with (
        torch.no_grad(),
        without_autocast(device),
        forwards_without_autocast(model),
        _given_back(model),
        without_training(model),  # before it is copied: a copy shares weights with it
    ):
        copy_of_model = None if is_placed(model) else _frozen_copy(model, dtype, device)
        if copy_of_model is None:
            with nullcontext() if is_placed(model) else converting_inputs(model, dtype):
                yield model
            return
        if convolutions(copy_of_model):
            run_channels_last(copy_of_model)
        if dtype != torch.float32:
            copy_of_model.register_forward_hook(
                lambda _, args, outputs: map_floating(outputs, Tensor.float)
            )
        with converting_inputs(copy_of_model, dtype):
            yield copy_of_model


@contextmanager
def _given_back(model: nn.Module) -> Iterator[None]:
    """Put every flag, and what forwards write into small buffers, back after a block."""
    is_whole = not is_placed(model)  # a buffer on the meta device has nothing to keep
    with as_it_was(model), same_buffers(model) if is_whole else nullcontext():
        yield


@contextmanager
def same_buffers(model: nn.Module) -> Iterator[None]:
    """Put back what forwards write into small buffers, such as running means and counts."""
    before = [
        (module, name, buffer, buffer.clone())
        for module in model.modules()
        if not isinstance(module, torch.jit.ScriptModule)
        for name, buffer in module._buffers.items()
        if buffer is not None and not buffer.is_meta and buffer.numel() <= _MOST_RESTORED
    ]
    try:
        yield
    finally:
        with torch.no_grad():
            for module, name, buffer, value in before:
                if not torch.equal(buffer, value):
                    buffer.copy_(value)
                module._buffers[name] = buffer


class _Conversion(NamedTuple):
    """A parameter or buffer, and the dtype that it has in the copy."""

    tensor: Tensor
    dtype: torch.dtype


def _conversions(model: nn.Module, dtype: torch.dtype) -> list[_Conversion]:
    """Every parameter and buffer with the dtype that it has in the copy.

    In the model's own dtype nothing is converted: its buffers may have another one, which its code
    counts on. In a lower one that keeps its dtype which loses its meaning in 8 bits of mantissa:
    integers, rotary frequencies, BatchNorm, and the modules that a Hugging Face model names as
    strictly float32.
    """
    own_dtypes = {dtype_of(model)}
    if runs_as_it_is(model):
        own_dtypes |= {parameter.dtype for parameter in model.parameters()}
    if dtype in own_dtypes:
        tensors = [*model.parameters(), *model.buffers()]
        return [_Conversion(tensor, tensor.dtype) for tensor in tensors]
    strict_names = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    conversions = []
    for path, module in model.named_modules():
        is_batch_norm = isinstance(module, nn.modules.batchnorm._BatchNorm)
        is_exact = is_batch_norm or not strict_names.isdisjoint(path.split("."))
        tensors = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in tensors:
            keeps_dtype = not tensor.is_floating_point() or "inv_freq" in name
            exact = _exact_dtype(tensor.dtype, dtype) if is_exact else dtype
            conversions.append(_Conversion(tensor, tensor.dtype if keeps_dtype else exact))
    return conversions


def _exact_dtype(own: torch.dtype, dtype: torch.dtype) -> torch.dtype:
    """The dtype of what keeps its mantissa in a copy: its own, where that runs beside the copy's.

    Layers of PyTorch take tensors in float32 beside inputs in a low dtype, and no wider ones.
    """
    if dtype.itemsize >= 4:
        return dtype
    return own if own.itemsize <= 4 else torch.float32


def _frozen_copy(model: nn.Module, dtype: torch.dtype, device: torch.device) -> nn.Module | None:
    """A converted copy; None where nothing is gained by one, or it is optional and fails."""
    conversions = _conversions(model, dtype)
    is_needed = any(
        each.tensor.device != device or each.tensor.dtype != each.dtype for each in conversions
    )
    if not (is_needed or convolutions(model)):
        return None
    # `deepcopy` looks an object up in its memo before it copies it. With the converted tensors in
    # there it copies the modules alone, so no tensor is ever in memory twice in its old dtype.
    memo: dict[int, Any] = {id(each): each.detach().clone() for each in _made_tensors(model)}
    for tensor, target_dtype in conversions:
        is_parameter = isinstance(tensor, nn.Parameter)
        # Layers in training mode write to buffers, so that these are copied in any case.
        value = tensor.detach().to(device, target_dtype, copy=not is_parameter)
        memo[id(tensor)] = nn.Parameter(value, requires_grad=False) if is_parameter else value
    try:
        copy_of_model = copy.deepcopy(model, memo)
    except Exception as error:  # locks, open files, activations that a user's hook keeps
        if is_needed:
            raise ValueError(
                f"the model can't be copied, as scoring in another dtype or on another device "
                f"needs ({type(error).__name__}: {error}); convert it before, and score it as it is"
            ) from error
        return None
    _bind_forwards(copy_of_model, memo)
    return copy_of_model


def deep_copied(model: nn.Module) -> nn.Module:
    """Return a copy of a model, also of one with tensors that were computed of parameters.

    `torch.nn.utils.weight_norm` and pruning keep the weight that they made among a layer's
    attributes, and `deepcopy` refuses it.
    """
    memo = {id(each): each.detach().clone() for each in _made_tensors(model)}
    copied: nn.Module = copy.deepcopy(model, memo)
    return copied


def _made_tensors(model: nn.Module) -> Iterator[Tensor]:
    for module in model.modules():
        for value in vars(module).values():
            if isinstance(value, Tensor) and not value.is_leaf:
                yield value


def _bind_forwards(copy_of_model: nn.Module, memo: dict[int, Any]) -> None:
    """Let forwards that were put into modules call the copy, where they captured the original.

    `deepcopy` takes functions as they are, with what they captured: TRL's trainers put a forward
    into the model that calls the model's first one.
    """
    for module in copy_of_model.modules():
        forward = vars(module).get("forward")
        function = getattr(forward, "__func__", forward)
        if not (isinstance(function, types.FunctionType) and function.__closure__):
            continue
        contents = [cell.cell_contents for cell in function.__closure__]
        copies = [_copy_of(value, memo) for value in contents]
        if all(map(operator.is_, contents, copies)):
            continue
        bound = types.FunctionType(
            function.__code__,
            function.__globals__,
            function.__name__,
            function.__defaults__,
            tuple(map(types.CellType, copies)),
        )
        bound.__kwdefaults__ = function.__kwdefaults__
        bound.__dict__.update(vars(function))
        module.forward = bound if forward is function else types.MethodType(bound, module)


def _copy_of(value: Any, memo: dict[int, Any]) -> Any:
    """A module, or a module's method, of the copy; anything else as it is."""
    if isinstance(value, nn.Module):
        return memo.get(id(value), value)
    if isinstance(value, types.MethodType) and id(value.__self__) in memo:
        return types.MethodType(value.__func__, memo[id(value.__self__)])
    return value


@contextmanager
def converting_inputs(
    model: nn.Module, dtype: torch.dtype, kept: Kept | None = None
) -> Iterator[None]:
    """Let a model take floating inputs of any dtype, for a block.

    Those that its own code takes as they are stay so: of seconds since 1970 in float64, say, it may
    take the difference first. So the first call with inputs of other dtypes is tried with these.

    Args:
        model: the model.
        dtype: what other inputs are converted to.
        kept: remembers from block to block which inputs stay as they are.
    """
    if isinstance(model, torch.jit.ScriptModule):  # takes no hooks
        yield
        return
    known = {} if kept is None else kept

    def convert(_: nn.Module, args: Any, kwargs: Any) -> Any:
        dtypes = tuple(tensor.dtype for tensor in tensors_in((args, kwargs)))
        others = [at for at, own in enumerate(dtypes) if own.is_floating_point and own != dtype]
        if not others:
            return None
        if dtypes not in known:
            with torch.no_grad():
                known[dtypes] = _taken(model, (args, kwargs), frozenset(others), dtype)
        return _converted((args, kwargs), known[dtypes], dtype)

    handle = model.register_forward_pre_hook(convert, with_kwargs=True)
    try:
        yield
    finally:
        handle.remove()


def _converted(inputs: Any, kept: frozenset[int], dtype: torch.dtype) -> Any:
    """Inputs with floating tensors in a dtype, but for those at the places that are kept."""
    places = count()

    def convert(tensor: Tensor) -> Tensor:
        is_kept = next(places) in kept
        return tensor if is_kept or not tensor.is_floating_point() else tensor.to(dtype)

    return map_tensors(inputs, convert)


def _taken(
    model: nn.Module, inputs: Any, others: frozenset[int], dtype: torch.dtype
) -> frozenset[int]:
    """The places of those inputs of other dtypes that a model takes as they are."""

    def runs(kept: frozenset[int]) -> bool:
        args, kwargs = _converted(cloned(inputs), kept, dtype)  # a forward may change its own
        try:
            model.forward(*args, **kwargs)
        except Exception:  # whatever it says of dtypes
            return False
        return True

    if runs(others):
        return others
    each = frozenset(at for at in others if len(others) > 1 and runs(frozenset([at])))
    return each if each and runs(each) else frozenset()
