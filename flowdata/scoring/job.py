"""A job: one model over one data set, how it is cut into packs, and the method for them."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata._common.unreadable import Unreadable, first_readable
from flowdata.errors import SampleError
from flowdata.models.compiled import pays
from flowdata.models.precision import name_of
from flowdata.scoring.collate import Collate
from flowdata.scoring.language.packable import common_prefix, why_not_packed
from flowdata.scoring.plan.lengths import length_of, sample_lengths
from flowdata.scoring.plan.packs import Plan, plan_fixed, plan_padded
from flowdata.scoring.plan.prompts import shared_prompts

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_LOOKED_AT = 16  # samples from which a common prefix is told and ways to score are checked
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
        found = []
        for index in range(0, len(self.dataset), -(-len(self.dataset) // _LOOKED_AT)):
            with contextlib.suppress(SampleError):  # the run will meet it and say so
                found.append(self.dataset[index])
        readable = [sample for sample in found if not isinstance(sample, Unreadable)]
        return sorted(readable or [first_readable(self.dataset)], key=tokens_of)

    @functools.cached_property
    def prefix(self) -> Tensor:
        """Tokens with which probably all samples begin, (P,) int64; empty if nothing uses them."""
        if self.loss != "causal_lm" or why_not_packed(self.model, self.loss) or len(self.few) < 2:
            return torch.empty(0, dtype=torch.long)
        return common_prefix(self.collate(self.few), self.loss)


def make_plan(job: Job, kept: Mapping[str, Any]) -> tuple[Plan, dict[str, Any]]:
    """Return the plan and its description; a begun store's options go before the job's."""
    kind = _kind(job.device)
    lengths = sample_lengths(job.dataset, job.lengths)
    batch_size = kept.get("batch_size", job.batch_size)
    max_tokens = kept.get("max_tokens", job.max_tokens)
    prefix = kept.get("prefix", len(job.prefix))
    groups, saved = (None, torch.zeros(1)) if lengths is None else _groups(job, prefix)
    if lengths is None:
        max_tokens, batch_size = None, batch_size or _BATCH_SIZE[kind]
        plan = plan_fixed(len(job.dataset), batch_size=batch_size)
    else:
        max_tokens = max_tokens or _MAX_TOKENS[kind]
        plan = plan_padded(
            lengths - prefix - saved, max_tokens=max_tokens, batch_size=batch_size, groups=groups
        )
    options = {
        "max_tokens": max_tokens,
        "batch_size": batch_size,
        "prefix": prefix,
        "shared_prompts": int(saved.sum()),
        "compile": kept.get("compile", _compiles(job, lengths)),
    }
    return plan, {**options, "packs": len(plan), "digest": plan.digest}


def _groups(job: Job, prefix: int) -> tuple[Tensor | None, Tensor]:
    """Which samples share a prompt, and how many tokens that saves each on average."""
    is_packed = job.loss == "causal_lm" and not why_not_packed(job.model, job.loss)
    read = job.lengths is None  # else the samples' lengths were given so as not to read them all
    found = shared_prompts(job.dataset) if is_packed and read else None
    if found is None:
        return None, torch.zeros(1, dtype=torch.long)
    groups, prompts = found
    counts = groups.bincount()[groups]
    return groups, (prompts - prefix).clamp_min(0) * (counts - 1) // counts


def _compiles(job: Job, lengths: Tensor | None) -> bool:
    if job.compile != "auto":
        return job.compile
    tokens = 0 if lengths is None else int(lengths.sum()) - len(job.prefix) * len(lengths)
    return pays(job.model, tokens, job.dtype, job.device)


def tokens_of(sample: Any) -> int:
    """Return how long a sample is, in tokens; 0 where it has none."""
    return length_of(sample) or 0


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"
