"""Later batches: the loss by name is the model's own on each, and not on the first one by chance.

A model of somebody's own may weigh a class that the first batch had none of, mask labels that it
had none of, or add a term that is 0 at the start.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.integrations.trainer_loss import RunLoss, count_batch, weighted_loss
from flowdata.models.calling import unwrapped
from flowdata.models.precision import dtype_of
from flowdata.targets.own_loss import agrees, named_terms, own_loss_of
from flowdata.targets.predictions import logits_of


def proven_loss(
    model: nn.Module,
    run: RunLoss,
    outputs: Any,
    batch: Mapping[str, Any],
    weights: Tensor | None,
    **options: Any,
) -> Tensor:
    """Return the weighted loss of a batch, where the same without weights is the model's own.

    Args:
        model: as it is trained.
        run: what it is trained on.
        outputs: what the model returned for the batch; its own loss is among it where the model was
            given the labels.
        batch: see `weighted_loss`.
        weights: see `weighted_loss`.
        options: see `weighted_loss`.

    Raises:
        ValueError: it is not, with both numbers.
    """
    own = own_loss_of(outputs) if run.passes_labels and isinstance(run.loss, str) else None
    if own is not None:
        _check(model, run, outputs, batch, own.item())
    return weighted_loss(run, outputs, batch, weights, **options)


@torch.no_grad()
def _check(
    model: nn.Module, run: RunLoss, outputs: Any, batch: Mapping[str, Any], own: float
) -> None:
    logits = logits_of(outputs)
    ones = torch.ones(len(logits), dtype=torch.float32, device=logits.device)
    if not count_batch(run, batch, ones, normalize="count"):
        return
    loss = weighted_loss(run, outputs, batch, ones, normalize="count", num_items=None)
    value = float(loss + named_terms(outputs, run.factors))
    dtype = min(dtype_of(unwrapped(model)), logits.dtype, key=lambda each: each.itemsize)
    if not agrees(own, value, dtype):
        raise ValueError(
            f"the unweighted loss of a batch is {value:.6g} by loss={run.loss!r}, and the model's "
            f"own is {own:.6g}, which it was on the batches before: the model trains on something "
            "else where these differ (class weights, labels that it masks, a further term …), "
            "which the weights would drop; pass loss= another name, a callable (outputs, batch) -> "
            "(B,) losses, or loss='own', which takes the model's own loss, one sample at a time"
        )
