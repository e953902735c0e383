"""The weights of a sample's targets, from the token losses that its scores keep."""

from __future__ import annotations

from typing import Literal

import torch
from torch import Tensor

from flowdata._common.values import check_values
from flowdata.scores.scores import Scores
from flowdata.weights import (
    Missing,
    Temperature,
    check_missing,
    resolve_temperature,
    warn_of_useless_weights,
    weigh,
    weigh_present,
)


def weigh_targets(
    scores: Scores,
    *,
    mode: Literal["token", "both"] = "token",
    temperature: Temperature = "median",
    missing: Missing = "raise",
) -> list[Tensor]:
    """Return the weights of each sample's targets, in order: N tensors, (counts[i],) float32.

    Args:
        scores: made with ``token_losses=True``, N samples.
        mode: ``"token"``, or ``"both"``: each token's weight times the weight of its sample,
            whose temperature the same rule picks from the samples' losses.
        temperature: as in `resolve_temperature`; ``"ess…"`` weighs relative to the smallest loss.
        missing: ``"raise"`` refuses samples with targets but without a finite loss, ``"zero"``
            gives all their tokens weight 0.

    Raises:
        ValueError: scores without token losses, samples without a finite loss under
            ``missing="raise"``, no token with one, or another `mode`.

    Example:
        >>> import torch
        >>> from flowdata import Scores
        >>> losses = torch.tensor([1.0, 1.0, 2.0])
        >>> scores = Scores(torch.ones(2), torch.tensor([1, 2]), token_losses=losses)
        >>> weigh_targets(scores)
        [tensor([0.3679]), tensor([0.3679, 0.1353])]
    """
    if mode not in ("token", "both"):
        raise ValueError(f"mode must be 'token' or 'both', got {mode!r}")
    check_missing(missing)
    losses = torch.cat([scores.token_losses(index) for index in range(len(scores))])
    has_loss = _tokens_with_a_loss(scores, losses, missing)
    # The check is of all tokens, so that the index in its message is the token's own.
    present = check_values(losses.where(has_loss, 0.0), "token losses")[has_loss]
    flat = torch.zeros(losses.shape, dtype=torch.float32)
    flat[has_loss] = weigh(present, resolve_temperature(present, temperature))
    if mode == "both":
        factors = weigh_present(scores.losses, temperature, missing="zero")
        flat *= factors.repeat_interleave(scores.counts)
    warn_of_useless_weights(present, flat[has_loss], temperature, unit="tokens")
    return list(flat.split(scores.counts.tolist()))


def _tokens_with_a_loss(scores: Scores, losses: Tensor, missing: Missing) -> Tensor:
    """Return which tokens are of samples whose losses are all finite, (ΣT,) bool."""
    is_absent = scores.losses.isnan() & (scores.counts > 0)
    infinite = (~losses.isfinite()).nonzero().flatten()
    is_absent[torch.searchsorted(scores.counts.cumsum(0), infinite, right=True)] = True
    if is_absent.any() and missing == "raise":
        raise ValueError(
            f"{int(is_absent.sum())} of {len(scores)} samples have no finite loss, the first is "
            f"sample {int(is_absent.int().argmax())}; pass missing='zero', which gives all their "
            "tokens weight 0, or drop them (keep = scores.losses.isfinite().nonzero()[:, 0]"
            ".tolist(), then their labels with scores[keep])"
        )
    has_loss = ~is_absent.repeat_interleave(scores.counts)
    if not has_loss.any():
        raise ValueError(f"none of the {len(scores)} samples has a target with a finite loss")
    return has_loss
