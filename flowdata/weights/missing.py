"""Weights of losses of which some are missing."""

from __future__ import annotations

from typing import Literal, TypeAlias

import torch
from torch import Tensor

from flowdata._common.values import check_values
from flowdata.weights.formula import weigh
from flowdata.weights.temperature import Temperature, resolve_temperature

Missing: TypeAlias = Literal["raise", "zero"]  # what becomes of samples without a loss


def check_missing(missing: str) -> None:
    """Raise ValueError unless `missing` says what becomes of samples without a loss."""
    if missing not in ("raise", "zero"):
        raise ValueError(f"missing must be 'raise' or 'zero', got {missing!r}")


def weigh_present(
    losses: Tensor,
    temperature: Temperature = "median",
    *,
    missing: Missing = "raise",
    column: str = "loss",
) -> Tensor:
    """Return the weights of losses, the temperature taken over those that are there.

    Args:
        losses: (N,) floating, non-negative; NaN for samples without a loss.
        temperature: as in `resolve_temperature`.
        missing: ``"raise"`` refuses samples without a loss, ``"zero"`` gives them weight 0.
        column: what the losses are, for messages: ``"loss"``, or the column in its place.

    Returns:
        (N,) float32 in [0, 1].

    Raises:
        ValueError: samples without a loss under ``missing="raise"`` (their indices named), no
            sample with one, a negative loss, or an unusable `temperature`.

    Example:
        >>> weigh_present(torch.tensor([1.0, torch.nan]), missing="zero")
        tensor([0.3679, 0.0000])
    """
    check_missing(missing)
    absent = losses.isnan()
    if absent.all():
        raise ValueError(
            f"none of the {len(losses)} samples has a {column}: check that the labels are not "
            "all ignored and that the model's outputs are finite"
        )
    if absent.any() and missing == "raise":
        indices = _listing(absent.nonzero().flatten().tolist())
        raise ValueError(
            f"{int(absent.sum())} of {len(losses)} samples have no {column} (no target, or a value "
            f"that is not finite in float32): indices {indices}; drop them (keep = "
            "scores.losses.isfinite().nonzero()[:, 0].tolist(), then [dataset[i] for i in keep] "
            "with scores[keep]), or pass scores.weights(missing='zero'), which gives them weight 0"
        )
    # The check is of all samples, so that the index in its message is the sample's own.
    present = check_values(losses.masked_fill(absent, 0.0), plural(column))[~absent]
    weights = torch.zeros(losses.shape, dtype=torch.float32)
    weights[~absent] = weigh(present, resolve_temperature(present, temperature))
    return weights


def plural(column: str) -> str:
    """Return what messages call the values of a column.

    Example:
        >>> plural("loss"), plural("entropy")
        ('losses', 'entropy values')
    """
    return "losses" if column == "loss" else f"{column} values"


def _listing(indices: list[int], most: int = 10) -> str:
    """Indices as a message shows them, the first `most` of them."""
    more = f", … ({len(indices)} in all)" if len(indices) > most else ""
    return ", ".join(map(str, indices[:most])) + more
