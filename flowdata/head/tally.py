"""Sums over the logits of all classes but the target, and how those of several parts become one."""

from __future__ import annotations

from typing import NamedTuple

from torch import Tensor

# The stand-in for a logit of −inf. It lies below every logit and is finite, so that 0 times it is 0
# and not NaN. Its square, which the sums need as well, is still within float32.
LOWEST = -1e15


class Tally(NamedTuple):
    """Four sums over the logits z of some classes, for every row.

    The loss and every column follow from them (tiled.py). The sums are relative to the largest
    logit, because exp(z) itself overflows float32 from z = 89 on.

    Attributes:
        top: (n,) float32, the largest z.
        total: (n,) float32, Σ exp(z − top); log total + top is the log-sum-exp.
        first: (n,) float32, Σ exp(z − top) · (z − top), for the entropy.
        squares: (n,) float32, Σ exp(2 (z − top)) · slope(z)², for the gradient's norm.
    """

    top: Tensor
    total: Tensor
    first: Tensor
    squares: Tensor


def merge(parts: Tally) -> Tally:
    """Return the tally of all classes from those of several parts, whose fields are (parts, n).

    Each part's sums are moved from its own largest logit m to the common one m', as in the online
    log-sum-exp: a factor exp(m − m') for each exponential, and z − m' = (z − m) + (m − m').

    Example:
        >>> import torch
        >>> z = torch.tensor([[1.0, 2.0], [3.0, 0.0]])  # two parts of two classes, one row
        >>> top = z.amax(1, keepdim=True)
        >>> total = (z - top).exp().sum(1, keepdim=True)
        >>> tally = merge(Tally(top, total, torch.zeros(2, 1), torch.zeros(2, 1)))
        >>> torch.allclose(tally.top + tally.total.log(), z.flatten().logsumexp(0))
        True
    """
    top = parts.top.amax(0)
    shift = parts.top - top
    factor = shift.exp()
    return Tally(
        top,
        (factor * parts.total).sum(0),
        (factor * (parts.first + shift * parts.total)).sum(0),
        (factor * factor * parts.squares).sum(0),
    )
