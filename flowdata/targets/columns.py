"""Columns: further values that scores keep of every sample, beside its loss.

Each is the mean over a sample's targets of

- `entropy`: of the predicted distribution, −Σ p log p, in nats;
- `correct`: 1 where no other class has a logit as large as the target's, else 0;
- `gradient_norm`: the norm of the loss's gradient with respect to the last layer's weight at
  that target alone. The layer makes u = weight · h and the model logits z = f(u), so the gradient
  is the outer product of (p − onehot) · f′(u) and h, and its norm exactly
  ‖(p − onehot) · f′(u)‖₂ · ‖h‖₂. With z = softcap · tanh(scale · u / softcap), f′ is
  scale · (1 − (z / softcap)²). A sample's value is the mean of its targets' norms, not the norm
  of their mean gradient; for a sample of one target both are the same.

The smaller `entropy` and `gradient_norm`, the easier the sample, as with the loss, whose place they
can take in weights. `correct` runs the other way.

This file takes them from full logits; flowdata/head does so tile by tile.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from flowdata.targets.which_loss import OWN

COLUMNS = ("entropy", "correct", "gradient_norm")
SMALL_WHERE_EASY = ("entropy", "gradient_norm")


def check_columns(columns: Sequence[str], loss: object) -> tuple[str, ...]:
    """Return the names of the columns, each once and in the order of `COLUMNS`.

    Args:
        columns: names among `COLUMNS`.
        loss: the loss's name, or a user's callable.

    Raises:
        TypeError: `columns` is a string, not a sequence of names.
        ValueError: an unknown name, or a loss that has no such columns.
    """
    if isinstance(columns, str):
        raise TypeError(f"columns must be a sequence of names such as ({columns!r},), got a string")
    for name in columns:
        if name not in COLUMNS:
            raise ValueError(f"columns must be among {', '.join(map(repr, COLUMNS))}, got {name!r}")
    if columns and (callable(loss) or loss in ("binary_cross_entropy", "mse", OWN)):
        name = "a callable" if callable(loss) else repr(loss)
        raise ValueError(
            f"columns are made from the logits of classes, which loss={name} doesn't have; "
            "pass columns=(), or a language model's loss or 'cross_entropy'"
        )
    return tuple(name for name in COLUMNS if name in columns)


def columns_of_logits(
    logits: Tensor,
    targets: Tensor,
    names: Sequence[str],
    hidden: Tensor | None = None,
    *,
    scale: float = 1.0,
    softcap: float | None = None,
) -> dict[str, Tensor]:
    """Return the named columns of every row, (n,) float32 each.

    Args:
        logits: (n, C) float32, scale and softcap applied.
        targets: (n,) int64 in [0, C), or (n, C) floating class probabilities, of which the
            largest counts as the target of `correct`.
        names: among `COLUMNS`.
        hidden: (n, d) floating, the last layer's inputs; for `gradient_norm`.
        scale: factor on the logits.
        softcap: their bound, or None.

    Raises:
        ValueError: `gradient_norm` without `hidden`.
    """
    values: dict[str, Tensor] = {}
    if not names:
        return values
    probabilities = logits.softmax(1)
    has_probabilities = targets.is_floating_point()
    if "entropy" in names:
        values["entropy"] = torch.special.entr(probabilities).sum(1)
    if "correct" in names:
        target = (targets.argmax(1) if has_probabilities else targets)[:, None]
        others = logits.scatter(1, target, -torch.inf).amax(1)
        values["correct"] = (logits.gather(1, target).squeeze(1) > others).float()
    if "gradient_norm" in names:
        if hidden is None:
            raise ValueError(
                "the column 'gradient_norm' needs what the model's last linear layer is given, "
                "but the logits are not the output of one; leave it out of columns"
            )
        expected = targets if has_probabilities else F.one_hot(targets, logits.shape[1])
        slope = (probabilities - expected) * scale  # of the loss, by what the last layer made
        if softcap is not None:
            slope *= 1 - (logits / softcap).square()  # the derivative of the tanh
        values["gradient_norm"] = slope.norm(dim=1) * hidden.float().norm(dim=1)
    return values
