"""Channels last: the layout in which convolutional networks run fastest, where their code can.

Outputs of convolutions in this layout are not contiguous. Code such as ``x.view(len(x), -1)`` fails
on them, and code that counts on strides, such as ``as_strided``, computes something else. So the
first call with inputs of some shapes, of one sample or of more, is run in both layouts. Channels
last are taken for such calls where the outputs are the same but for rounding::

    first call of some shapes ──┬── contiguous ─────┬── the same? ── how later ones are run
                                └── channels last ──┘

Inputs of one number, as a blank image, tell nothing. The truth about samples is made `as_laid_out`,
so that the check sees where the first call told too little; then the layout is given up.

Outside the model's forward the weights lie as PyTorch lays them, for functions that call its parts.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata.models.tensors import cloned, map_tensors, tensors_in

_MARK = "takes_channels_last"  # of a forward that may be run so
_is_plain = ContextVar("is_plain", default=False)
_ROUNDING, _LOW_ROUNDING = 2.0**-8, 2.0**-4  # of the largest output: TF32's, 16 bits' after layers


class _Weight(NamedTuple):
    """A convolution's weight in both layouts."""

    layer: nn.Conv2d
    plain: nn.Parameter
    channels_last: nn.Parameter


def convolutions(model: nn.Module) -> list[nn.Conv2d]:
    """Return the convolutions of a convolutional network, which run fastest with channels last.

    A lone convolution is a transformer's patch embedding, which is better left as it is.
    """
    layers = [module for module in model.modules() if type(module) is nn.Conv2d]
    return layers if len(layers) > 1 else []


def run_channels_last(model: nn.Module) -> None:
    """Let a frozen model that nobody else has run its convolutions with channels last.

    Its outputs are contiguous, as whatever reads them expects.
    """
    layers, forward = convolutions(model), model.forward
    weights = _weights_of(layers)
    rounding = _ROUNDING if layers[0].weight.dtype.itemsize >= 4 else _LOW_ROUNDING
    fits: dict[Any, bool] = {}  # by the shapes of inputs

    @functools.wraps(forward)
    def laid_out(*args: Any, **kwargs: Any) -> Any:
        if torch.compiler.is_compiling():
            return forward(*args, **kwargs)
        shapes = _shapes_of((args, kwargs))
        is_told = shapes in fits or not _are_blank((args, kwargs))
        if _is_plain.get() or not is_told or not is_channels_last(model):
            return plainly(args, kwargs)
        if shapes in fits:
            return by_channels_last(args, kwargs) if fits[shapes] else plainly(args, kwargs)
        inputs = cloned((args, kwargs))  # a forward may change its own
        outputs = plainly(args, kwargs)
        try:
            others = by_channels_last(*inputs)
        except torch.OutOfMemoryError:
            raise
        except Exception:  # whatever the code says of strides: it runs without
            others = None
        fits[shapes] = _are_same(outputs, others, rounding)
        return others if fits[shapes] else outputs

    def plainly(args: Any, kwargs: Any) -> Any:
        return map_tensors(forward(*args, **kwargs), _contiguous)

    def by_channels_last(args: Any, kwargs: Any) -> Any:
        with _channels_last(weights):
            return plainly(args, kwargs)

    vars(laid_out)[_MARK] = True
    model.forward = laid_out


@contextmanager
def as_laid_out() -> Iterator[None]:
    """Run convolutional networks in the layout that they are written for, for a block."""
    before = _is_plain.set(True)
    try:
        yield
    finally:
        _is_plain.reset(before)


def is_channels_last(model: nn.Module) -> bool:
    """Return whether a model may run with channels last."""
    return bool(getattr(model.forward, _MARK, False))


def let_channels_last(model: nn.Module, is_let: bool) -> None:
    """Say whether a model that `run_channels_last` was given may still run so."""
    vars(model.forward)[_MARK] = is_let


def _weights_of(layers: Sequence[nn.Conv2d]) -> list[_Weight]:
    """The weights of convolutions, but those that a function computes; a tied one is laid once."""
    laid: dict[int, nn.Parameter] = {}
    weights = []
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is not None:
            if id(weight) not in laid:
                value = weight.detach().contiguous(memory_format=torch.channels_last)
                laid[id(weight)] = nn.Parameter(value, requires_grad=False)
            weights.append(_Weight(layer, weight, laid[id(weight)]))
    return weights


@contextmanager
def _channels_last(weights: Sequence[_Weight]) -> Iterator[None]:
    """Lay the weights with channels last for a block."""
    for each in weights:
        each.layer._parameters["weight"] = each.channels_last
    try:
        yield
    finally:
        for each in weights:
            each.layer._parameters["weight"] = each.plain


def _are_same(outputs: Any, others: Any, rounding: float) -> bool:
    """Whether two outputs are the same but for rounding; not where no tensor of them is seen."""
    tensors, others = tensors_in(outputs), tensors_in(others)
    if not tensors or len(tensors) != len(others):
        return False
    return all(_is_same(*pair, rounding) for pair in zip(tensors, others, strict=True))


def _is_same(one: Tensor, other: Tensor, rounding: float) -> bool:
    if one.shape != other.shape or not one.is_floating_point():
        return torch.equal(one, other)
    largest = float(one.abs().nan_to_num(posinf=0).max()) if one.numel() else 0.0
    return torch.allclose(one, other, rtol=0, atol=rounding * largest, equal_nan=True)


def _are_blank(inputs: Any) -> bool:
    """Whether each map of inputs is of one number, so that no output tells layouts apart."""
    tensors = [tensor for tensor in tensors_in(inputs) if tensor.numel()]
    maps = [tensor for tensor in tensors if tensor.dim() >= 3] or tensors
    return all(bool((each == each.flatten()[0]).all()) for each in maps)


def _contiguous(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4 and tensor.layout == torch.strided
    return tensor.contiguous() if is_image else tensor


def _shapes_of(inputs: Any) -> tuple[Any, ...]:
    """The shapes of inputs, where two samples are as many as more: strides differ for one alone."""
    shapes = (tuple(tensor.shape) for tensor in tensors_in(inputs))
    return tuple((*(min(size, 2) for size in shape[:1]), *shape[1:]) for shape in shapes)
