"""A model that fails on samples: what to say of it, in place of PyTorch's own words alone."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor

from flowdata.errors import OutOfRangeError
from flowdata.models.tensors import tensors_in

_PIXELS_DIMS = {torch.uint8: 3}  # from which on a batch of whole numbers is one of pixels
_IMAGES_DIMS = 4  # of other numbers; wider integers may be tokens of several choices
_CHANNELS = (1, 3, 4)  # that images have


def explain_failure(error: Exception, inputs: Any, where: str) -> None:
    """Raise ValueError, with the remedy, where a model fails on samples for what they are.

    Errors of memory, and those of classes of their own, say enough: after these it returns.

    Args:
        error: what the model raised.
        inputs: the batch that it was given, without targets where they can be told.
        where: the samples, for the message.
    """
    if type(error) not in (RuntimeError, NotImplementedError) or "alloc" in str(error):
        return
    reason = _first_line(error)
    remedy = "give samples of the shape and dtype that it takes"
    if dtype := _pixels_of(inputs):
        remedy += (
            f". These have pixels of {dtype}: convert them to floating numbers, as by "
            ".float() / 255, and normalise them as the model was trained"
        )
    elif _has_channels_last(inputs):
        remedy += (
            ". These seem to have their channels last, where most models take images of shape "
            "(C, H, W): .permute(2, 0, 1) puts them first"
        )
    raise ValueError(f"the model fails on {where} ({reason}); {remedy}") from error


@contextmanager
def order_explained(batch: Any) -> Iterator[None]:
    """Say of a failing block, where a batch may be (targets, inputs), in which order they belong.

    Args:
        batch: of samples; one whole number of each first, and an array of each second, may be the
            wrong way round.
    """
    try:
        yield
    except OutOfRangeError:  # which says enough
        raise
    except Exception as error:
        is_pair = isinstance(batch, tuple | list) and len(batch) == 2
        if not is_pair or not all(isinstance(part, Tensor) for part in batch):
            raise
        first, second = batch
        if first.is_floating_point() or first.dim() > 1 or second.dim() < 2:
            raise
        raise ValueError(
            "samples must be (input, target) pairs, and these have one whole number first and "
            f"shape {tuple(second.shape[1:])} second: if the first is the target, swap them "
            f"({_first_line(error.__cause__ or error)})"
        ) from error


def _first_line(error: BaseException) -> str:
    return str(error).partition("\n")[0]


def _has_channels_last(inputs: Any) -> bool:
    """Whether a batch holds what can be images of shape (H, W, C), and not of (C, H, W)."""
    images = [tensor for tensor in tensors_in(inputs) if tensor.dim() == _IMAGES_DIMS]
    return any(each.shape[-1] in _CHANNELS and each.shape[1] not in _CHANNELS for each in images)


def _pixels_of(inputs: Any) -> str:
    """The dtype of a batch's pixels where they are whole numbers, else ""."""
    for tensor in tensors_in(inputs):
        is_whole = not (tensor.is_floating_point() or tensor.is_complex())
        dims = _PIXELS_DIMS.get(tensor.dtype, _IMAGES_DIMS)
        if is_whole and tensor.dtype != torch.bool and tensor.dim() >= dims:
            return str(tensor.dtype).removeprefix("torch.")
    return ""
