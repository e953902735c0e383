"""A job: one model over one data set. How it is cut into packs, and the losses of each pack."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata.progress import progress_bar
from flowdata.scores import Scores
from flowdata.scoring.batches import Collate, sample_lengths
from flowdata.scoring.language import agrees, methods
from flowdata.scoring.plan import Plan, plan_fixed, plan_padded
from flowdata.scoring.precision import map_tensors, name_of, scoring_model
from flowdata.scoring.tasks import LANGUAGE_LOSSES, Method, callable_method, prediction_method

logger = logging.getLogger("flowdata")

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_CHECKED_SAMPLES = 2  # on which a fast way is compared with the plain one

LossFunction = Callable[[nn.Module, Any], Tensor]
Columns = dict[str, Tensor]


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


def run_packs(
    job: Job, plan: Plan, options: Mapping[str, Any], todo: Sequence[int]
) -> Iterator[tuple[int, Columns]]:
    """Run packs of a plan and yield each one's number and columns, its samples in plan order."""
    if not todo:
        return
    batches = DataLoader(
        job.dataset,
        batch_sampler=[plan.pack(index).tolist() for index in todo],
        collate_fn=job.collate,
        num_workers=job.num_workers,
        generator=torch.Generator().manual_seed(0),
    )
    total, left = int(plan.costs.sum()), int(plan.costs[list(todo)].sum())
    unit = "samples" if options["max_tokens"] is None else "tokens"
    with (
        scoring_model(job.model, job.dtype, job.device) as model,
        _adapters_off(model) if job.reference == "base" else nullcontext(),
        _compiled(model) if job.compiled else nullcontext(),
        progress_bar(total, "scoring", unit, done=total - left, shown=job.progress) as advance,
    ):
        method, method_name = choose_method(job, model)
        job.announce("; ".join(filter(None, [job.name, method_name, _cut(options)])))
        for index, batch in zip(todo, batches, strict=True):
            columns = method(model, _moved(job, batch)).columns(token_losses=job.token_losses)
            if len(columns["loss"]) != len(plan.pack(index)):
                raise ValueError(
                    f"a batch of {len(plan.pack(index))} samples gave {len(columns['loss'])} "
                    "losses; collate_fn and loss must keep one entry for each sample, in order"
                )
            yield index, columns
            advance(int(plan.costs[index]))


def choose_method(job: Job, model: nn.Module) -> tuple[Method, str]:
    """Return the fastest way to the losses that agrees with the plainest, and its name."""
    if not isinstance(job.loss, str):
        return callable_method(job.loss), ""
    if job.loss not in LANGUAGE_LOSSES:
        return prediction_method(job.loss), ""
    *ways, (plainest, plain) = methods(model, job.loss)
    few = range(min(_CHECKED_SAMPLES, len(job.dataset)))
    batch = _moved(job, job.collate([job.dataset[index] for index in few]))
    for name, method in ways:
        reason = agrees(method, plain, model, batch, job.dtype)
        if not reason:
            return method, name
        logger.warning("not scoring by %s: %s", name, reason)
    return plain, plainest


def merge_packs(plan: Plan, packs: Mapping[int, Columns], metadata: dict[str, Any]) -> Scores:
    """Return the packs' columns in data set order; say how many samples have no loss."""
    columns = {
        name: torch.cat([packs[index][name] for index in range(len(plan))]) for name in packs[0]
    }
    where = plan.order.argsort()
    token_losses = columns.get("token_loss")
    if token_losses is not None:
        samples = token_losses.split(columns["count"].tolist())
        token_losses = torch.cat([samples[index] for index in where.tolist()])
    scores = Scores(
        columns["loss"][where],
        columns["count"][where],
        metadata=metadata,
        token_losses=token_losses,
    )
    missing = scores.losses.isnan()
    if missing.any():
        logger.warning(
            "%d of %d samples have no loss: %d without a target, %d with a non-finite loss; "
            "the first is sample %d. weights(missing='zero') gives them weight 0",
            int(missing.sum()),
            len(scores),
            int((scores.counts == 0).sum()),
            int((missing & (scores.counts > 0)).sum()),
            int(missing.int().argmax()),
        )
    return scores


def _moved(job: Job, batch: Any) -> Any:
    return map_tensors(batch, lambda tensor: tensor.to(job.device, non_blocking=True))


def _cut(options: Mapping[str, Any]) -> str:
    packs, tokens = options["packs"], options["max_tokens"]
    most = f"{options['batch_size']} samples" if tokens is None else f"{tokens:,} tokens"
    return f"{packs:,} pack{'s' * (packs != 1)} of at most {most}"


def _adapters_off(model: Any) -> AbstractContextManager[None]:
    off: AbstractContextManager[None] = model.disable_adapter()
    return off


@contextmanager
def _compiled(model: Any) -> Iterator[None]:
    """Compile a module's call for a block."""
    model.compile(dynamic=True)
    try:
        yield
    finally:
        model._compiled_call_impl = None
