"""Fine-tuning a classifier by a method."""

from __future__ import annotations

from functools import partial
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import weighted_mean
from flowdata.sampler import FlowSampler
from flowdata.scores import Scores
from flowdata.study.hits import autocast, class_numbers
from flowdata.study.training import Method, passes, train
from flowdata.token_weights import LARGEST_LOGITS, TokenRule, looks_at_logits, rule_weights


def sample_weights(method: Method, scores: Scores) -> Tensor:
    """Return the (N,) weights of a method: ones, unless it makes some from the scores."""
    return torch.ones(len(scores)) if method.weights is None else method.weights(scores)


def fine_tune(
    model: nn.Module,
    data: Any,
    weights: Tensor,
    method: Method,
    *,
    rate: float,
    seed: int,
    epochs: int,
    batch: int,
    dtype: str = "float32",
    workers: int = 0,
) -> None:
    """Train in place by SGD with momentum 0.9, weight decay 5e-4 and a cosine schedule.

    A method with ``trains=False`` leaves the model as it is.

    Args:
        model: inputs (B, …) → logits (B, C).
        data: map-style, samples (input, class).
        weights: (N,) weights of the samples, see `sample_weights`.
        method: tells how the weights are used, and brings the parts that act beside them.
        rate: the highest learning rate of the schedule; 0 for a method that doesn't train.
        seed: makes the order, and the random draws of the method's parts.
        epochs: number of passes over the data.
        batch: number of samples in a batch; an epoch's last samples are dropped if they fill none.
        dtype: the forward pass's, ``"float32"``, or ``"bfloat16"`` under autocast.
        workers: number of processes that load samples.

    Raises:
        ValueError: the data fills no batch, its targets are no classes of the model's, the method
            holds outputs, see `train`, or it doesn't train and has a rate.
    """
    if not method.trains:
        if rate != 0:
            raise ValueError(
                "a method with trains=False leaves the model as it is, at no learning rate: pass "
                f"rate=0, got {rate!r} (`grids` gives each method its rates)"
            )
        return
    if len(data) < batch:
        raise ValueError(
            f"the {len(data):,} training samples fill no batch of {batch}, so that nothing would "
            f"be trained; pass batch={len(data)} or less (Sizes(batch=) of a HeadTask)"
        )
    torch.manual_seed(seed)
    device = next(model.parameters()).device
    loader = partial(DataLoader, batch_size=batch, drop_last=True, num_workers=workers)
    if method.resample:
        batches = loader(data, sampler=FlowSampler(weights, seed=seed))
        # Resampling minimises Σwℓ / Σw, weighting Σwℓ / N. The latter's steps are smaller by the
        # mean weight, so the former's rate is multiplied by it: one rate then means the same.
        rate *= weights.mean().item()
    else:
        triples = FlowWeightedDataset(data, weights, layout="triple")
        batches = loader(triples, shuffle=True)

    def loss(batch: list[Tensor]) -> Tensor:
        inputs, targets, *weight = batch
        with autocast(device, dtype):
            logits = model(inputs.to(device, non_blocking=True))
        losses = F.cross_entropy(logits.float(), class_numbers(logits, targets), reduction="none")
        if method.rule is not None:
            losses = losses * _rule_weights(method.rule, logits.float(), losses)
        return weighted_mean(losses, weight[0].to(device)) if weight else losses.mean()

    sgd = partial(torch.optim.SGD, lr=rate, momentum=0.9, weight_decay=5e-4, foreach=True)
    train(model, passes(batches, epochs), epochs * len(batches), loss, sgd, method, seed=seed)


def _rule_weights(rule: TokenRule, logits: Tensor, losses: Tensor) -> Tensor:
    """A rule's (B,) weights of a batch's samples, as it would make them of tokens."""
    values = logits.topk(min(LARGEST_LOGITS, logits.shape[1])).values
    takes_part = torch.ones_like(losses, dtype=torch.bool)
    return rule_weights(rule, values if looks_at_logits(rule) else losses, takes_part)
