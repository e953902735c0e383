"""The run: packs of a plan through the model, and their columns back in data set order."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata.progress import progress_bar
from flowdata.scores import Scores
from flowdata.scoring.job import Job, choose_method, moved
from flowdata.scoring.plan import Plan
from flowdata.scoring.precision import scoring_model

logger = logging.getLogger("flowdata")

Columns = dict[str, Tensor]


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
            columns = method(model, moved(job, batch)).columns(token_losses=job.token_losses)
            if len(columns["loss"]) != len(plan.pack(index)):
                raise ValueError(
                    f"a batch of {len(plan.pack(index))} samples gave {len(columns['loss'])} "
                    "losses; collate_fn and loss must keep one entry for each sample, in order"
                )
            yield index, columns
            advance(int(plan.costs[index]))


def merge_packs(plan: Plan, packs: Mapping[int, Columns], metadata: dict[str, Any]) -> Scores:
    """Return the packs' columns in data set order; say how many samples have no loss."""
    columns = {
        name: torch.cat([packs[index][name] for index in range(len(plan))]) for name in packs[0]
    }
    where = plan.order.argsort()
    token_losses = columns.pop("token_loss", None)
    if token_losses is not None:
        samples = token_losses.split(columns["count"].tolist())
        token_losses = torch.cat([samples[index] for index in where.tolist()])
    ordered = {name: values[where] for name, values in columns.items()}
    scores = Scores(
        ordered.pop("loss"),
        ordered.pop("count"),
        metadata=metadata,
        token_losses=token_losses,
        columns=ordered,
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
