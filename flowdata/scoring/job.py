"""A job: one model over one data set, and how the data set is cut into packs."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata._common.unreadable import Unreadable, first_readable
from flowdata.errors import SampleError
from flowdata.models.compiled import pays
from flowdata.models.precision import name_of
from flowdata.scoring.collate import Collate
from flowdata.scoring.language.packed import (
    common_prefix,
    why_not_packed,
)
from flowdata.scoring.plan.lengths import length_of, sample_lengths
from flowdata.scoring.plan.packs import Plan, PlanOptions, plan_fixed, plan_padded
from flowdata.scoring.plan.prompts import shared_prompts

# Tokens, or samples, in one pack where the user names no number: enough to keep matrix products
# at their full rate on the CPUs measured; the figures for a GPU are not measured.
_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_FEW = 16  # samples in which a common prefix is looked for and on which ways are checked
LossFunction = Callable[[nn.Module, Any], Tensor]


@dataclass(frozen=True)
class Job:
    """What to run, with every choice made but that of the packs.

    Attributes:
        announce: takes the sentence that says how losses are made, once the way is known.
        other fields: as the arguments of `LossScorer` and `LossScorer.score`.
    """

    model: nn.Module
    loss: str | LossFunction
    dtype: torch.dtype
    device: torch.device
    reference: str
    token_losses: bool
    columns: tuple[str, ...]
    compile: Literal["auto"] | bool
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

    @functools.cached_property
    def few(self) -> list[Any]:
        """Samples from all over the data set, shortest first."""
        samples = []
        for index in range(0, len(self.dataset), -(-len(self.dataset) // _FEW)):
            with contextlib.suppress(SampleError):  # the run will meet it and say so
                samples.append(self.dataset[index])
        readable = [sample for sample in samples if not isinstance(sample, Unreadable)]
        return sorted(readable or [first_readable(self.dataset)], key=tokens_of)

    @functools.cached_property
    def prefix(self) -> Tensor:
        """Tokens with which probably all samples begin, (P,) int64; empty if nothing uses them."""
        if self.loss != "causal_lm" or why_not_packed(self.model, self.loss) or len(self.few) < 2:
            return torch.empty(0, dtype=torch.long)
        return common_prefix(self.collate(self.few), self.loss)


def make_plan(job: Job, begun: Mapping[str, Any], threads: int) -> Plan:
    """Return how the job's data set is cut into packs.

    Args:
        job: the job.
        begun: the `plan` field of a begun store's manifest, whose options go before the job's;
            empty without a store.
        threads: with which PyTorch computes, unless `begun` says.
    """
    lengths = sample_lengths(job.dataset, job.lengths)
    prefix = begun.get("prefix", len(job.prefix))
    groups, savings = _prompt_groups(job, lengths, prefix)
    kind = "cuda" if job.device.type == "cuda" else "cpu"
    max_tokens = begun.get("max_tokens", job.max_tokens)
    batch_size = begun.get("batch_size", job.batch_size)
    if lengths is None:
        max_tokens, batch_size = None, batch_size or _BATCH_SIZE[kind]
        plan = plan_fixed(len(job.dataset), batch_size=batch_size)
    else:
        max_tokens = max_tokens or _MAX_TOKENS[kind]
        own_lengths = lengths - prefix - savings
        plan = plan_padded(own_lengths, max_tokens=max_tokens, batch_size=batch_size, groups=groups)
    options = PlanOptions(
        max_tokens=max_tokens,
        batch_size=batch_size,
        prefix=prefix,
        shared_prompts=int(savings.sum()),
        compile=begun.get("compile", _compiles(job, lengths)),
        threads=begun.get("threads", threads),
    )
    return replace(plan, options=options)


def _prompt_groups(job: Job, lengths: Tensor | None, prefix: int) -> tuple[Tensor | None, Tensor]:
    """Return which samples share a prompt, and how many tokens that saves each on average.

    Nothing is looked for where the user gave the lengths: that was to spare reading all samples.
    """
    can_share = job.loss == "causal_lm" and not why_not_packed(job.model, job.loss)
    sharing = None
    if lengths is not None and job.lengths is None and can_share:
        sharing = shared_prompts(job.dataset)
    if sharing is None:
        return None, torch.zeros(1, dtype=torch.long)
    groups, prompt_lengths = sharing
    group_sizes = groups.bincount()[groups]
    return groups, (prompt_lengths - prefix).clamp_min(0) * (group_sizes - 1) // group_sizes


def _compiles(job: Job, lengths: Tensor | None) -> bool:
    if job.compile != "auto":
        return job.compile
    tokens = 0 if lengths is None else int(lengths.sum()) - len(job.prefix) * len(lengths)
    return pays(job.model, tokens, job.dtype, job.device)


def tokens_of(sample: Any) -> int:
    """Return how long a sample is, in tokens; 0 where it has none."""
    return length_of(sample) or 0
