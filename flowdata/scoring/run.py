"""The run: packs of a plan through the model, and their columns back in data set order."""

from __future__ import annotations

import functools
from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import DataLoader

from flowdata._common.progress import progress_bar
from flowdata._common.unreadable import Unreadable
from flowdata.models.compiled import compiled_layers
from flowdata.models.copies import scoring_model
from flowdata.models.placement import is_sharded, reshard
from flowdata.models.rope import loaded_frequencies
from flowdata.scoring.check import choose_way
from flowdata.scoring.collate import Collate
from flowdata.scoring.job import Job
from flowdata.scoring.lend import adapters_off, torch_threads
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.ranks import Ranks
from flowdata.store.packs import Columns
from flowdata.targets.target_losses import Fetched

_NAMED = 5  # samples, of a pack in which something failed
Done = tuple[int, Columns, dict[int, str]]  # a pack, its columns, samples skipped and why


def run_packs(
    job: Job, plan: Plan, options: Mapping[str, Any], todo: Sequence[int], ranks: Ranks
) -> Iterator[Done]:
    """Run this rank's share of packs; a pack's columns have its samples in plan order.

    Ranks that hold a model together all run every pack.
    """
    if not todo:
        return
    together = ranks.size > 1 and is_sharded(job.model)
    claimed: deque[int] = deque()

    def claim() -> Iterator[list[int]]:
        for index in todo if together else ranks.claims(todo, ahead=job.num_workers > 0):
            claimed.append(index)
            yield plan.pack(index).tolist()

    costs = torch.cat([plan.costs.new_zeros(1), plan.costs[list(todo)].cumsum(0)]).tolist()
    total, shown = int(plan.costs.sum()), 0
    unit = "samples" if options["max_tokens"] is None else "tokens"
    with (
        torch_threads(options["threads"]),
        scoring_model(job.model, job.dtype, job.device) as model,
        loaded_frequencies(model),
        adapters_off(model) if job.reference == "base" else nullcontext(),
        compiled_layers(model) if options["compile"] else nullcontext(),
        progress_bar(total, "scoring", unit, done=total - costs[-1], shown=job.progress) as advance,
    ):
        method, way_name = choose_way(job, model, options)
        if len(set(ranks.gather("method", way_name))) > 1:
            raise ValueError(
                f"rank {ranks.rank} can score by {way_name!r}, another rank can't: losses would "
                "depend on who makes them; run on machines of one kind"
            )
        job.announce("; ".join(filter(None, [job.name, way_name, _cut(options)])))
        started: deque[Callable[[], Done]] = deque()
        for batch, reasons in _loaded(job, claim()):
            index = claimed.popleft()
            if not together and not ranks.begins(index):
                continue
            with _naming(plan, index):
                losses = None if batch is None else Fetched(method(model, batch))
            started.append(functools.partial(_done, job, plan, index, losses, reasons))
            while len(started) > _ahead(job.device):
                yield started.popleft()()
            done = costs[min(ranks.claimed, len(todo)) - len(claimed)]
            advance(done - shown)
            shown = done
        for finish in started:
            yield finish()
        reshard(job.model)


@contextmanager
def _naming(plan: Plan, index: int) -> Iterator[None]:
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


def _done(
    job: Job, plan: Plan, index: int, losses: Fetched | None, reasons: dict[int, str]
) -> Done:
    """A pack once its losses are there; None if none of its samples could be read."""
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


def _loaded(job: Job, packs: Iterator[list[int]]) -> Iterator[tuple[Any, dict[int, str]]]:
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


def _cut(options: Mapping[str, Any]) -> str:
    packs, tokens = options["packs"], options["max_tokens"]
    most = f"{options['batch_size']} samples" if tokens is None else f"{tokens:,} tokens"
    return f"{packs:,} pack{'s' * (packs != 1)} of at most {most}"
