"""A frozen copy of a model in another dtype, on another device."""

from __future__ import annotations

import copy
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.placement import is_placed
from flowdata.models.tensors import map_floating


@contextmanager
def frozen_model(model: nn.Module, dtype: torch.dtype, device: torch.device) -> Iterator[nn.Module]:
    """Lend a model in eval mode, of the dtype and on the device wanted, without gradients.

    Where nothing needs converting the caller's own model is lent and its training flags are put
    back. Else it is a copy whose parameters are converted one by one: the caller's are never
    touched, and the copy takes only the size of what had to be converted, convolutions' memory
    format included. Floating inputs are converted to the dtype on the way in, and a copy's
    outputs to float32 on the way out.
    """
    with torch.no_grad():
        targets = [] if is_placed(model) else _target_dtypes(model, dtype)
        kernels = _convolution_kernels(model) if targets else set()
        converts = any(t.device != device or t.dtype != wanted for t, wanted in targets)
        lent = _converted(model, targets, kernels, device, must=converts)
        if lent is not None:
            if dtype != torch.float32:
                lent.register_forward_hook(lambda _, args, out: map_floating(out, Tensor.float))
            with _taking(lent, dtype):
                yield lent
            return
        training = [(module, module.training) for module in model.modules()]
        trainable = [(parameter, parameter.requires_grad) for parameter in model.parameters()]
        try:
            with nullcontext() if is_placed(model) else _taking(model, dtype):
                yield model.eval()
        finally:
            for module, flag in training:
                module.training = flag
            for parameter, flag in trainable:  # PEFT sets them when it turns adapters on again
                parameter.requires_grad = flag


def _target_dtypes(model: nn.Module, dtype: torch.dtype) -> list[tuple[Tensor, torch.dtype]]:
    """Every parameter and buffer with the dtype it is to have.

    What loses its meaning in 8 bits of mantissa stays as it is: integers, rotary frequencies,
    BatchNorm, and the modules that a Hugging Face model names as strictly float32.
    """
    strict = set(getattr(model, "_keep_in_fp32_modules_strict", None) or ())
    targets = []
    for path, module in model.named_modules():
        keep = isinstance(module, nn.modules.batchnorm._BatchNorm) or not strict.isdisjoint(
            path.split(".")
        )
        own = [*module.named_parameters(recurse=False), *module.named_buffers(recurse=False)]
        for name, tensor in own:
            kept = keep or not tensor.is_floating_point() or "inv_freq" in name
            targets.append((tensor, tensor.dtype if kept else dtype))
    return targets


def _convolution_kernels(model: nn.Module) -> set[int]:
    """The weights of a convolutional network, by id: they run fastest with channels last.

    A lone convolution is a transformer's patch embedding, and better left as it is.
    """
    layers = [module for module in model.modules() if type(module) is nn.Conv2d]
    return {id(layer.weight) for layer in layers} if len(layers) > 1 else set()


def _converted(
    model: nn.Module,
    targets: list[tuple[Tensor, torch.dtype]],
    kernels: set[int],
    device: torch.device,
    *,
    must: bool,
) -> nn.Module | None:
    """A converted copy; None where nothing is to be gained, or it can't be made and needn't."""
    if not (must or kernels):
        return None
    memo: dict[int, Any] = {}  # what deepcopy takes instead of copying a tensor itself
    for tensor, wanted in targets:
        written = not isinstance(tensor, nn.Parameter)  # by layers in training mode
        value = tensor.detach().to(device, wanted, copy=written)
        if id(tensor) in kernels:
            value = value.contiguous(memory_format=torch.channels_last)
        memo[id(tensor)] = (
            nn.Parameter(value, requires_grad=False) if isinstance(tensor, nn.Parameter) else value
        )
    try:
        return copy.deepcopy(model, memo).eval()
    except Exception as error:  # locks, open files, activations that were kept
        if must:
            raise ValueError(
                f"the model can't be copied, as scoring in another dtype or on another device "
                f"needs ({type(error).__name__}: {error}); convert it before, and score it as it is"
            ) from error
        return None


@contextmanager
def _taking(model: nn.Module, dtype: torch.dtype) -> Iterator[None]:
    """Let a model take floating inputs of any dtype."""
    handle = model.register_forward_pre_hook(
        lambda _, args, kwargs: map_floating((args, kwargs), lambda t: t.to(dtype)),
        with_kwargs=True,
    )
    try:
        yield
    finally:
        handle.remove()
