"""Checks of losses and weights from users, which become tensors."""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from typing import TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

Values: TypeAlias = "Tensor | NDArray[np.floating] | Sequence[float]"


def check_values(values: Values, name: str = "losses") -> Tensor:
    """Return values as a detached (N,) tensor, uncopied where possible.

    Args:
        values: (N,) floating, finite, non-negative; narrower ones become float32.
        name: what messages call the values: ``"losses"``, ``"weights"``, or what takes the place
            of losses.

    Raises:
        TypeError: `values` are not floating.
        ValueError: `values` are empty, not 1-D, negative or non-finite (first index named).
    """
    tensor = _as_tensor(values, name)
    if not tensor.is_floating_point():
        raise TypeError(f"{name} must be floating, got dtype {tensor.dtype}")
    if tensor.dim() != 1 or tensor.numel() == 0:
        raise ValueError(f"{name} must be 1-D and not empty, got shape {tuple(tensor.shape)}")
    if tensor.dtype not in (torch.float32, torch.float64):
        tensor = tensor.float()  # numpy knows no bfloat16, torch counts in no float8; it is exact
    low, high = torch.aminmax(tensor)  # one pass; a NaN among the values makes both NaN
    if not (low >= 0 and high < torch.inf):
        raise ValueError(_first_bad_value(tensor, name))
    return tensor


def _as_tensor(values: Values, name: str) -> Tensor:
    with warnings.catch_warnings():
        # torch warns of a read-only memory map, because a tensor of it must not be written to.
        # Nothing in the library writes to the values.
        warnings.filterwarnings("ignore", message="The given NumPy array is not writable")
        try:
            return torch.as_tensor(values).detach()
        except (TypeError, ValueError, RuntimeError):
            hint = "; pass its .losses" if hasattr(values, "losses") else ""
            dtype = getattr(values, "dtype", None)  # one that torch hasn't, as longdouble
            of_dtype = "" if dtype is None else f" of {dtype}"
            raise TypeError(
                f"{name} must be a tensor, an array or a list of floats, got "
                f"{type(values).__name__}{of_dtype}{hint}"
            ) from None


def _first_bad_value(values: Tensor, name: str) -> str:
    """The message on the first value that is not finite, or else on the first negative one."""
    bad = ~values.isfinite()
    what, remedy = "not finite", "find out why, or drop or zero-weight these samples"
    if not bad.any():
        bad, what, remedy = values < 0, "negative", "they must be >= 0"
        if name != "weights":
            remedy = f"FLOW needs {name} >= 0; subtract their minimum first"
    first = int(bad.int().argmax())
    return (
        f"{name}[{first}] is {values[first].item()}: {int(bad.sum())} of "
        f"{values.numel()} {name} are {what}; {remedy}"
    )
