"""The run: packs of a plan through the model, one after another.

    claimed → loaded (perhaps by workers) → started on the device → finished on the host

With workers several packs are claimed and loaded ahead of the one that the model is given. On a GPU
one pack is started ahead of the one whose losses are waited for, so that the GPU never waits:

    host   start 0   start 1   finish 0   start 2   finish 1   …
    GPU              ──── 0 ────────── 1 ────────── 2 ────────
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from flowdata._common.offsets import offsets_of
from flowdata._common.progress import progress_bar
from flowdata.errors import DisagreementError, OutOfRangeError
from flowdata.models.placement import is_sharded
from flowdata.scoring.batches import Batch, load_batches
from flowdata.scoring.check import AgreedWay, agreed_way
from flowdata.scoring.grouping import alone
from flowdata.scoring.job import Job
from flowdata.scoring.kinds import longest_checked
from flowdata.scoring.lend import lent_model
from flowdata.scoring.locating import checked_indices, located
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.ranks import Ranks, one_rank
from flowdata.scoring.suspects import in_largest_pack
from flowdata.scoring.threads import describe_threads
from flowdata.scoring.truth import Truth
from flowdata.store.packs import Columns
from flowdata.targets.target_losses import Fetched

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


@dataclass
class CheckReport:
    """What was checked: how many samples, alone, and the largest difference of their losses.

    `num_classes` is what their logits told apart, classes or tokens; 0 where that is not known.
    """

    samples: int = 0
    largest_difference: float = 0.0
    num_classes: int = 0

    def add(self, samples: int, largest: float) -> None:
        """Take further samples into account."""
        self.samples += samples
        self.largest_difference = max(self.largest_difference, largest)


def run_packs(
    job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks, report: CheckReport
) -> Iterator[FinishedPack]:
    """Run this rank's share of packs and yield them as they are finished.

    Args:
        job: the job.
        plan: the job's plan.
        todo: the packs to run, the same on every rank.
        ranks: the ranks that share the packs. Those that hold a model together run all of them.
        report: takes what was checked.

    Raises:
        DisagreementError: a sample that was checked during the run has another loss alone.
    """
    if not todo:
        return
    threads = describe_threads(
        plan.options.threads, job.device, goes_on=len(todo) < len(plan), is_first=ranks.is_first
    )
    with lent_model(job, plan.options) as model, _progress(job, plan, todo) as show:
        try:
            agreed = agreed_way(job, plan, model, ranks)
        except OutOfRangeError as error:
            raise located(error, job, checked_indices(job, plan)) from error
        report.add(agreed.truth.samples, agreed.truth.largest)
        report.num_classes = agreed.truth.num_classes
        way = [job.name, agreed.description, _describe_packs(plan), threads]
        job.announce("; ".join(filter(None, [*way, _describe_check(report)])))
        share = _Share(job, plan, todo, ranks, agreed)
        started = _start_packs(job, plan, share, agreed, model, report)
        for pack in _finish_packs(started, ahead=1 if job.device.type == "cuda" else 0):
            yield pack
            show(share.packs_behind())


class _Share:
    """This rank's share of the packs, as it is claimed, loaded and begun.

    DataLoader workers claim packs well before these are run, so a claimed pack waits in a queue
    until its batch is there; by then another rank may have begun it.
    """

    def __init__(
        self, job: Job, plan: Plan, todo: Sequence[int], ranks: Ranks, agreed: AgreedWay
    ) -> None:
        self.job, self.plan, self.todo, self.agreed = job, plan, todo, agreed
        # Ranks that hold a model together call it together: each runs all packs, as if alone.
        claimants = one_rank() if is_sharded(job.model) else ranks
        self.claims = claimants.claims(todo, ahead=job.num_workers > 0)
        self.queue: deque[int] = deque()

    def batches(self) -> Iterator[tuple[int, Batch]]:
        """Yield each pack to run with its batch."""
        # A run of samples alone is the truth itself.
        kinds = None if self.agreed.grouping is alone else self.agreed.kinds
        also = in_largest_pack(self.plan)
        grouping = self.agreed.grouping
        for batch in load_batches(self.job, self._claim_packs(), grouping, kinds, also):
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
    unit = "samples" if plan.options.max_tokens is None else "tokens"
    behind = offsets_of(plan.amounts[list(todo)]).tolist()
    total, shown = int(plan.amounts.sum()), 0
    with progress_bar(
        total, "scoring", unit, initial=total - behind[-1], shown=job.progress
    ) as advance:

        def show(packs: int) -> None:
            nonlocal shown
            advance(behind[packs] - shown)
            shown = behind[packs]

        yield show


@dataclass(frozen=True)
class _StartedPack:
    """A pack that the model was given, and its losses on their way; None if it has no sample.

    Attributes:
        alone: samples of the pack that were run alone as well, by their place among the readable
            ones: their batches, and their losses on their way.
    """

    job: Job
    index: int
    samples: Tensor
    losses: Fetched | None
    unreadable: dict[int, str]
    alone: dict[int, tuple[Any, Fetched]]
    truth: Truth
    report: CheckReport

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
        self._check(columns, is_readable)
        if self.unreadable:
            columns = _spread(columns, is_readable)
        skipped = {int(self.samples[place]): reason for place, reason in self.unreadable.items()}
        return FinishedPack(self.index, columns, skipped)

    def _check(self, columns: Columns, is_readable: Tensor) -> None:
        """Compare the samples that were run alone as well with what the pack gave them."""
        for place, (batch, losses) in self.alone.items():
            sample = {
                name: values[place : place + 1]
                for name, values in columns.items()
                if name != "token_loss"
            }
            true = losses.columns(token_losses=False)
            if _is_long(self.job, batch):
                reason = self.truth.difference_to_same_way(sample, true)
            else:
                reason = self.truth.difference(sample, true, batch)
            if reason:
                index = int(self.samples[is_readable][place])
                raise DisagreementError(index, reason)
            off = float((sample["loss"] - true["loss"]).abs().nan_to_num())
            self.report.add(1, off)

    def _columns(self) -> Columns:
        if self.losses is not None:
            return self.losses.columns(token_losses=self.job.token_losses)
        names = ["loss", *(["token_loss"] if self.job.token_losses else []), *self.job.columns]
        empty = {name: torch.empty(0, dtype=torch.float32) for name in names}
        return {**empty, "count": torch.empty(0, dtype=torch.long)}


def _start_packs(
    job: Job,
    plan: Plan,
    share: _Share,
    agreed: AgreedWay,
    model: nn.Module,
    report: CheckReport,
) -> Iterator[_StartedPack]:
    """Give the model one batch after another, without waiting for the losses."""
    truth = agreed.truth
    for index, batch in share.batches():
        with _naming_samples(job, plan, index):
            losses = Fetched(agreed.way(model, batch.content)) if batch.content else None
            few = {
                place: (each, _start_alone(agreed, model, each))
                for place, each in batch.alone.items()
            }
        samples = plan.pack(index)
        yield _StartedPack(job, index, samples, losses, batch.unreadable, few, truth, report)


def _start_alone(agreed: AgreedWay, model: nn.Module, batch: Any) -> Fetched:
    """Start a sample alone: by the model's own forward, or where it is long by the run's way."""
    if _is_long(agreed.truth.job, batch):
        return Fetched(agreed.way(model, [batch]))
    return agreed.truth.start(batch)


def _is_long(job: Job, batch: Any) -> bool:
    """Return whether the full logits of a sample, collated alone, would be too large."""
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return isinstance(ids, Tensor) and ids.shape[-1] > longest_checked(job.loss)


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
def _naming_samples(job: Job, plan: Plan, index: int) -> Iterator[None]:
    """Say of an error which samples the model was given."""
    try:
        yield
    except OutOfRangeError as error:
        raise located(error, job, plan.pack(index).tolist()) from error
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


def _describe_packs(plan: Plan) -> str:
    tokens, samples = plan.options.max_tokens, plan.options.batch_size
    most = f"{samples} samples" if tokens is None else f"{tokens:,} tokens"
    return f"{len(plan):,} pack{'s' * (len(plan) != 1)} of at most {most}"


def _describe_check(report: CheckReport) -> str:
    samples = f"{report.samples} sample{'s' * (report.samples != 1)}"
    return f"{samples} checked alone, off by {report.largest_difference:.1g} at most"
