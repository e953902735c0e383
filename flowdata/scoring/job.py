"""A job: one model over one data set, how it is cut into packs, and the method for them."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.scoring.batches import Collate, sample_lengths
from flowdata.scoring.language import agrees, methods
from flowdata.scoring.plan import Plan, plan_fixed, plan_padded
from flowdata.scoring.precision import map_tensors, name_of
from flowdata.scoring.tasks import LANGUAGE_LOSSES, Method, callable_method, prediction_method

logger = logging.getLogger("flowdata")

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_CHECKED_SAMPLES = 2  # on which a fast way is compared with the plain one

LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """What to run, with every choice made but that of the packs.

    Attributes:
        announce: is told, once the method is known, what was chosen.
        other fields: as the arguments of `LossScorer` and `LossScorer.score`.
    """

    model: nn.Module
    loss: str | LossFunction
    dtype: torch.dtype
    device: torch.device
    reference: str
    token_losses: bool
    compiled: bool
    max_tokens: int | None
    batch_size: int | None
    dataset: Any
    collate: Collate
    lengths: Any
    num_workers: int
    progress: bool
    announce: Callable[[str], None]

    @property
    def name(self) -> str:
        """The loss and where it is computed, as a user would say it."""
        loss = self.loss if isinstance(self.loss, str) else "the given callable"
        return f"{loss} in {name_of(self.dtype)} on {self.device}"


def make_plan(job: Job, kept: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Return the plan and its description; a begun store's options go before the job's."""
    kind = "cuda" if job.device.type == "cuda" else "cpu"
    lengths = sample_lengths(job.dataset, job.lengths)
    batch_size = kept.get("batch_size", job.batch_size)
    max_tokens = kept.get("max_tokens", job.max_tokens)
    if lengths is None:
        max_tokens, batch_size = None, batch_size or _BATCH_SIZE[kind]
        plan = plan_fixed(len(job.dataset), batch_size=batch_size)
    else:
        max_tokens = max_tokens or _MAX_TOKENS[kind]
        plan = plan_padded(lengths, max_tokens=max_tokens, batch_size=batch_size)
    options = {"max_tokens": max_tokens, "batch_size": batch_size}
    return plan, {**options, "packs": len(plan), "digest": plan.digest}


def choose_method(job: Job, model: nn.Module) -> tuple[Method, str]:
    """Return the fastest way to the losses that agrees with the plainest, and its name."""
    if not isinstance(job.loss, str):
        return callable_method(job.loss), ""
    if job.loss not in LANGUAGE_LOSSES:
        return prediction_method(job.loss), ""
    *ways, (plainest, plain) = methods(model, job.loss)
    few = range(min(_CHECKED_SAMPLES, len(job.dataset)))
    batch = moved(job, job.collate([job.dataset[index] for index in few]))
    for name, method in ways:
        reason = agrees(method, plain, model, batch, job.dtype)
        if not reason:
            return method, name
        logger.warning("not scoring by %s: %s", name, reason)
    return plain, plainest


def moved(job: Job, batch: Any) -> Any:
    """Return a batch on the job's device."""
    return map_tensors(batch, lambda tensor: tensor.to(job.device, non_blocking=True))
