"""The run: packs of a plan through the model, one after another.

claimed → loaded by workers → begun on the device → finished on the host → handed on
"""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata._common.offsets import offsets_of
from flowdata._common.progress import progress_bar
from flowdata._common.unreadable import Unreadable
from flowdata.models.placement import is_sharded
from flowdata.scoring.check import agreed_way
from flowdata.scoring.collate import Collate
from flowdata.scoring.job import Job
from flowdata.scoring.lend import lent_model
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.ranks import Ranks
from flowdata.store.packs import Columns
from flowdata.targets.target_losses import Fetched

_NAMED = 5  # samples of a pack that an error names
FinishedPack = tuple[int, Columns, dict[int, str]]  # its number, its columns, samples skipped, why


def run_packs(job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks) -> Iterator[FinishedPack]:
    """Run this rank's share of packs; a pack's columns have its samples in plan order.

    Ranks that hold a model together all run every pack.
    """
    if not todo:
        return
    share = _Share(job, plan, todo, ranks)
    with lent_model(job, plan.options) as model, _cost_shown(job, plan, todo) as show:
        way, name = agreed_way(job, plan.options, model, ranks)
        job.announce("; ".join(filter(None, [job.name, name, _describe_packs(plan)])))
        in_flight: deque[Callable[[], FinishedPack]] = deque()
        for index, batch, reasons in share.loaded():
            with _samples_named(plan, index):
                losses = None if batch is None else Fetched(way(model, batch))
            in_flight.append(functools.partial(_finish, job, plan, index, losses, reasons))
            while len(in_flight) > _ahead(job.device):
                yield in_flight.popleft()()
            show(share.packs_behind())
        for finish in in_flight:
            yield finish()


class _Share:
    """This rank's share of the packs, as it is claimed, loaded and begun.

    DataLoader workers claim packs well before these are run, so a claimed pack waits in a queue
    until its batch is there; by then another rank may have begun it.
    """

    def __init__(self, job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks) -> None:
        self.job, self.plan, self.todo, self.ranks = job, plan, todo, ranks
        self.runs_all = ranks.size > 1 and is_sharded(job.model)
        self.queue: deque[int] = deque()

    def loaded(self) -> Iterator[tuple[int, Any, dict[int, str]]]:
        """Yield each pack to run, its batch, and by place why samples could not be read."""
        for batch, reasons in _batches(self.job, self._claims()):
            index = self.queue.popleft()
            if self.runs_all or self.ranks.begins(index):
                yield index, batch, reasons

    def packs_behind(self) -> int:
        """Return how many packs of `todo` all ranks together have claimed and run."""
        return min(self.ranks.claimed, len(self.todo)) - len(self.queue)

    def _claims(self) -> Iterator[list[int]]:
        ahead = self.job.num_workers > 0
        for index in self.todo if self.runs_all else self.ranks.claims(self.todo, ahead=ahead):
            self.queue.append(index)
            yield self.plan.pack(index).tolist()


@contextmanager
def _cost_shown(job: Job, plan: Plan, todo: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Show the progress of a run; gives what is told how many packs of `todo` are behind."""
    costs = offsets_of(plan.costs[list(todo)]).tolist()
    total, shown = int(plan.costs.sum()), 0
    unit = "samples" if plan.options.max_tokens is None else "tokens"
    with progress_bar(
        total, "scoring", unit, done=total - costs[-1], shown=job.progress
    ) as advance:

        def show(packs: int) -> None:
            nonlocal shown
            advance(costs[packs] - shown)
            shown = costs[packs]

        yield show


@contextmanager
def _samples_named(plan: Plan, index: int) -> Iterator[None]:
    """Say of an error which samples the model was given."""
    try:
        yield
    except Exception as error:
        samples = ", ".join(map(str, plan.pack(index)[:_NAMED].tolist()))
        more = ", …" if len(plan.pack(index)) > _NAMED else ""
        text = error.args[0] if error.args else ""
        if isinstance(text, str):
            error.args = (f"{text} (while scoring samples {samples}{more})", *error.args[1:])
        raise


def _ahead(device: torch.device) -> int:
    """Packs whose losses are not waited for: a GPU is given the next one first."""
    return 1 if device.type == "cuda" else 0


def _finish(
    job: Job, plan: Plan, index: int, losses: Fetched | None, reasons: dict[int, str]
) -> FinishedPack:
    """Wait for a pack's losses, which are None if none of its samples could be read."""
    samples = plan.pack(index)
    readable = torch.ones(len(samples), dtype=torch.bool)
    readable[list(reasons)] = False
    expected = int(readable.sum())
    if losses is None:
        columns = {"loss": torch.empty(0), "count": torch.empty(0, dtype=torch.long)}
        columns |= {"token_loss": torch.empty(0)} if job.token_losses else {}
        columns |= {name: torch.empty(0) for name in job.columns}
    else:
        columns = losses.columns(token_losses=job.token_losses)
    if len(columns["loss"]) != expected:
        raise ValueError(
            f"a batch of {expected} samples gave {len(columns['loss'])} "
            "losses; collate_fn and loss must keep one entry for each sample, in order"
        )
    skipped = {int(samples[place]): reason for place, reason in reasons.items()}
    return index, _spread(columns, readable) if reasons else columns, skipped


def _spread(columns: Columns, readable: Tensor) -> Columns:
    """Columns with NaN, or a count of 0, at the samples that could not be read."""
    spread = {}
    for name, values in columns.items():
        if name == "token_loss":
            spread[name] = values
        else:
            fill = torch.nan if values.is_floating_point() else 0
            spread[name] = torch.full((len(readable),), fill, dtype=values.dtype)
            spread[name][readable] = values
    return spread


def _batches(job: Job, packs: Iterator[list[int]]) -> Iterator[tuple[Any, dict[int, str]]]:
    """Batches of packs as they are claimed, and the reasons of what could not be read."""
    loader: DataLoader[Any] = DataLoader(
        job.dataset,
        batch_sampler=packs,  # it need not have a length
        collate_fn=_WithReasons(job.collate),
        num_workers=job.num_workers,
        pin_memory=job.device.type == "cuda",  # its copies then need not be waited for
        generator=torch.Generator().manual_seed(0),
    )
    try:
        batches = iter(loader)
    except Exception as error:  # which one depends on what can't be pickled
        if job.num_workers == 0 or "pickle" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(
            f"the data set or collate_fn can't be sent to DataLoader workers ({error}); define it "
            "at the top level of a module, or pass num_workers=0"
        ) from error
    yield from batches


class _WithReasons:
    """Collates what could be read; gives with it, by place, the reasons of what could not."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> tuple[Any, dict[int, str]]:
        reasons = {
            place: sample.reason
            for place, sample in enumerate(samples)
            if isinstance(sample, Unreadable)
        }
        return None if len(reasons) == len(samples) else self.collate(samples), reasons


def _describe_packs(plan: Plan) -> str:
    tokens, samples = plan.options.max_tokens, plan.options.batch_size
    most = f"{samples} samples" if tokens is None else f"{tokens:,} tokens"
    return f"{len(plan):,} pack{'s' * (len(plan) != 1)} of at most {most}"
