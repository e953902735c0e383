"""The run: packs of a plan through the model, one after another.

    claimed → loaded (perhaps by workers) → started on the device → finished on the host

With workers several packs are claimed and loaded ahead of the one that the model is given. On a GPU
one pack is started ahead of the one whose losses are waited for, so that the GPU never waits:

    host   start 0   start 1   finish 0   start 2   finish 1   …
    GPU              ──── 0 ────────── 1 ────────── 2 ────────
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
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
from flowdata.scoring.ranks import Ranks, one_rank
from flowdata.store.packs import Columns
from flowdata.targets.target_losses import Fetched, Way

_NAMED = 5  # samples of a pack that an error names


class FinishedPack(NamedTuple):
    """A pack whose losses are on the host.

    Attributes:
        number: its place in the plan.
        columns: what the store keeps of its samples, in plan order.
        skipped: why samples could not be read, by their index in the data set.
    """

    number: int
    columns: Columns
    skipped: dict[int, str]


class Batch(NamedTuple):
    """What a DataLoader makes of a pack.

    Attributes:
        content: the readable samples, collated; None where there are none.
        unreadable: why samples could not be read, by their place in the pack.
    """

    content: Any
    unreadable: dict[int, str]


def run_packs(job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks) -> Iterator[FinishedPack]:
    """Run this rank's share of packs and yield them as they are finished.

    Args:
        job: the job.
        plan: the job's plan.
        todo: the packs to run, the same on every rank.
        ranks: the ranks that share the packs. Those that hold a model together run all of them.
    """
    if not todo:
        return
    share = _Share(job, plan, todo, ranks)
    with lent_model(job, plan.options) as model, _progress(job, plan, todo) as show:
        way, description = agreed_way(job, plan.options, model, ranks)
        job.announce("; ".join(filter(None, [job.name, description, _describe_packs(plan)])))
        started = _start_packs(job, plan, share, way, model)
        for pack in _finish_packs(started, ahead=1 if job.device.type == "cuda" else 0):
            yield pack
            show(share.packs_behind())


class _Share:
    """This rank's share of the packs, as it is claimed, loaded and begun.

    DataLoader workers claim packs well before these are run, so a claimed pack waits in a queue
    until its batch is there; by then another rank may have begun it.
    """

    def __init__(self, job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks) -> None:
        self.job, self.plan, self.todo = job, plan, todo
        # Ranks that hold a model together call it together: each runs all packs, as if alone.
        claimants = one_rank() if is_sharded(job.model) else ranks
        self.claims = claimants.claims(todo, ahead=job.num_workers > 0)
        self.queue: deque[int] = deque()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield each pack to run with its batch."""
        for batch in _load_batches(self.job, self._claim_packs()):
            index = self.queue.popleft()  # a DataLoader gives batches in the order of its sampler
            if self.claims.begins(index):
                yield index, batch

    def packs_behind(self) -> int:
        """Return how many packs of `todo` all ranks have claimed, less those that wait here."""
        return self.claims.claimed - len(self.queue)

    def _claim_packs(self) -> Iterator[list[int]]:
        for index in self.claims:
            self.queue.append(index)
            yield self.plan.pack(index).tolist()


@contextmanager
def _progress(job: Job, plan: Plan, todo: Sequence[int]) -> Iterator[Callable[[int], None]]:
    """Show a run's progress; gives a function that is told how many packs of `todo` are behind."""
    costs = offsets_of(plan.costs[list(todo)]).tolist()
    total, cost_shown = int(plan.costs.sum()), 0
    unit = "samples" if plan.options.max_tokens is None else "tokens"
    with progress_bar(
        total, "scoring", unit, initial=total - costs[-1], shown=job.progress
    ) as advance:

        def show(packs: int) -> None:
            nonlocal cost_shown
            advance(costs[packs] - cost_shown)
            cost_shown = costs[packs]

        yield show


@dataclass(frozen=True)
class _StartedPack:
    """A pack that the model was given, and its losses on their way; None if it has no sample."""

    job: Job
    index: int
    samples: Tensor
    losses: Fetched | None
    unreadable: dict[int, str]

    def finish(self) -> FinishedPack:
        """Wait for the losses."""
        is_readable = torch.ones(len(self.samples), dtype=torch.bool)
        is_readable[list(self.unreadable)] = False
        columns = self._columns()
        if len(columns["loss"]) != int(is_readable.sum()):
            raise ValueError(
                f"a batch of {int(is_readable.sum())} samples gave {len(columns['loss'])} "
                "losses; collate_fn and loss must keep one entry for each sample, in order"
            )
        if self.unreadable:
            columns = _spread(columns, is_readable)
        skipped = {int(self.samples[place]): reason for place, reason in self.unreadable.items()}
        return FinishedPack(self.index, columns, skipped)

    def _columns(self) -> Columns:
        if self.losses is not None:
            return self.losses.columns(token_losses=self.job.token_losses)
        names = ["loss", *(["token_loss"] if self.job.token_losses else []), *self.job.columns]
        empty = {name: torch.empty(0) for name in names}
        return {**empty, "count": torch.empty(0, dtype=torch.long)}


def _start_packs(
    job: Job, plan: Plan, share: _Share, way: Way, model: nn.Module
) -> Iterator[_StartedPack]:
    """Give the model one batch after another, without waiting for the losses."""
    for index, batch in share.batches():
        with _naming_samples(plan, index):
            losses = None if batch.content is None else Fetched(way(model, batch.content))
        yield _StartedPack(job, index, plan.pack(index), losses, batch.unreadable)


def _finish_packs(started: Iterable[_StartedPack], *, ahead: int) -> Iterator[FinishedPack]:
    """Wait for each pack's losses once so many packs after it have been started."""
    in_flight: deque[_StartedPack] = deque()
    for pack in started:
        in_flight.append(pack)
        if len(in_flight) > ahead:
            yield in_flight.popleft().finish()
    for pack in in_flight:
        yield pack.finish()


@contextmanager
def _naming_samples(plan: Plan, index: int) -> Iterator[None]:
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


def _spread(columns: Columns, is_readable: Tensor) -> Columns:
    """Columns with NaN, or a count of 0, at the samples that could not be read.

    Without targets these have no place among `token_loss`, which is as it was.
    """
    spread = {}
    for name, values in columns.items():
        if name == "token_loss":
            spread[name] = values
        else:
            fill = torch.nan if values.is_floating_point() else 0
            spread[name] = torch.full((len(is_readable),), fill, dtype=values.dtype)
            spread[name][is_readable] = values
    return spread


def _load_batches(job: Job, packs: Iterator[list[int]]) -> Iterator[Batch]:
    """Read and collate packs' samples, given by their indices, as the packs are claimed."""
    loader: DataLoader[Any] = DataLoader(
        job.dataset,
        batch_sampler=packs,  # it need not have a length
        collate_fn=_CollateReadable(job.collate),
        num_workers=job.num_workers,
        pin_memory=job.device.type == "cuda",  # nothing waits for copies from pinned memory
        # The default generator would be drawn from, and the caller's random numbers change.
        generator=torch.Generator().manual_seed(0),
    )
    try:
        batches = iter(loader)
    except Exception as error:  # its type depends on what can't be pickled
        if job.num_workers == 0 or "pickle" not in f"{type(error).__name__} {error}".lower():
            raise
        raise ValueError(
            f"the data set or collate_fn can't be sent to DataLoader workers ({error}); define it "
            "at the top level of a module, or pass num_workers=0"
        ) from error
    yield from batches


class _CollateReadable:
    """Collates the samples that could be read, and keeps the reasons of the others."""

    def __init__(self, collate: Collate) -> None:
        self.collate = collate

    def __call__(self, samples: list[Any]) -> Batch:
        unreadable = {
            place: sample.reason
            for place, sample in enumerate(samples)
            if isinstance(sample, Unreadable)
        }
        content = None if len(unreadable) == len(samples) else self.collate(samples)
        return Batch(content, unreadable)


def _describe_packs(plan: Plan) -> str:
    tokens, samples = plan.options.max_tokens, plan.options.batch_size
    most = f"{samples} samples" if tokens is None else f"{tokens:,} tokens"
    return f"{len(plan):,} pack{'s' * (len(plan) != 1)} of at most {most}"
