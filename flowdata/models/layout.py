"""Channels last: the layout in which convolutional networks run fastest, where their code can.

Outputs of convolutions in this layout are not contiguous, and code such as ``x.view(len(x), -1)``
fails on them. A call that fails so is repeated in PyTorch's own layout. Which of both a call is run
in depends on nothing but the shapes of its inputs, so that its outputs are the same to the last bit
in every process, whatever it ran before::

    call ── channels last ──┬── outputs
                            └── fails on strides ── contiguous ── outputs
"""

from __future__ import annotations

import functools
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.tensors import map_tensors

_OF_A_LAYOUT = ("stride", "contiguous")  # words of errors that another layout may spare


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
    failing: set[Any] = set()  # shapes of inputs
    current = _lay_out(layers, torch.channels_last)

    @functools.wraps(forward)
    def laid_out(*args: Any, **kwargs: Any) -> Any:
        nonlocal current
        if torch.compiler.is_compiling():  # an error ends that, and the model is run as written
            return forward(*args, **kwargs)
        shapes = _shapes_of((args, kwargs))
        layout = torch.contiguous_format if shapes in failing else torch.channels_last
        if current != layout:
            current = _lay_out(layers, layout)
        try:
            return map_tensors(forward(*args, **kwargs), _contiguous)
        except RuntimeError as error:
            if shapes in failing or not any(word in str(error) for word in _OF_A_LAYOUT):
                raise
        current = _lay_out(layers, torch.contiguous_format)
        outputs = map_tensors(forward(*args, **kwargs), _contiguous)
        failing.add(shapes)
        return outputs

    model.forward = laid_out


def _lay_out(layers: list[nn.Conv2d], layout: torch.memory_format) -> torch.memory_format:
    """Give convolutions weights in a layout, a tied one once; return the layout."""
    weights: dict[int, nn.Parameter] = {}
    for layer in layers:
        weight = layer._parameters.get("weight")
        if weight is None:  # a function computes it
            continue
        if id(weight) not in weights:
            value = weight.detach().contiguous(memory_format=layout)
            weights[id(weight)] = nn.Parameter(value, requires_grad=False)
        layer._parameters["weight"] = weights[id(weight)]
    return layout


def _contiguous(tensor: Tensor) -> Tensor:
    is_image = tensor.dim() == 4 and tensor.layout == torch.strided
    return tensor.contiguous() if is_image else tensor


def _shapes_of(inputs: Any) -> tuple[Any, ...]:
    shapes: list[Any] = []

    def note(tensor: Tensor) -> Tensor:
        shapes.append(tuple(tensor.shape))
        return tensor

    map_tensors(inputs, note)
    return tuple(shapes)
