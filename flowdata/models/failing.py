"""A model that fails on samples: what to say of it, in place of PyTorch's own words alone."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor

from flowdata.models.tensors import map_tensors

_PIXELS_DIMS = {torch.uint8: 3}  # from which on a batch of whole numbers is one of pixels
_OTHER_DIMS = 4  # the same of wider integers, which may be tokens of several choices


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
    reason = str(error).partition("\n")[0]
    remedy = "give samples of the shape and dtype that it takes"
    if dtype := _pixels_of(inputs):
        remedy += (
            f". These have pixels of {dtype}: convert them to floating numbers, as by "
            ".float() / 255, and normalise them as the model was trained"
        )
    raise ValueError(f"the model fails on {where} ({reason}); {remedy}") from error


def _pixels_of(inputs: Any) -> str:
    """The dtype of a batch's pixels where they are whole numbers, else ""."""
    dtypes: list[str] = []

    def look(tensor: Tensor) -> Tensor:
        is_whole = not (tensor.is_floating_point() or tensor.is_complex())
        dims = _PIXELS_DIMS.get(tensor.dtype, _OTHER_DIMS)
        if is_whole and tensor.dtype != torch.bool and tensor.dim() >= dims:
            dtypes.append(str(tensor.dtype).removeprefix("torch."))
        return tensor

    map_tensors(inputs, look)
    return dtypes[0] if dtypes else ""
