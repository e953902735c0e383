"""A job: one model over one data set, how it is cut into packs, and the method for them."""

from __future__ import annotations

import contextlib
import functools
import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata._common.unreadable import SampleError, Unreadable, first_readable
from flowdata.models.compiled import is_compiled, pays, run_eagerly
from flowdata.models.precision import name_of
from flowdata.models.rope import longest_alike
from flowdata.scoring.collate import Collate, length_of, sample_lengths
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packed import (
    Packing,
    common_prefix,
    why_batch_not_packed,
    why_not_packed,
)
from flowdata.scoring.language.ways import agrees, methods
from flowdata.scoring.plan.packs import Plan, plan_fixed, plan_padded
from flowdata.scoring.plan.prompts import shared_prompts
from flowdata.targets.predictions import LANGUAGE_LOSSES, Method, callable_method, prediction_method

logger = logging.getLogger("flowdata")

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_CHECKED = 2048  # tokens of a sample whose full logits are still held for a check
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
        return sorted(readable or [first_readable(self.dataset)], key=_tokens)

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


def choose_method(job: Job, model: nn.Module, options: Mapping[str, Any]) -> tuple[Method, str]:
    """Return the fastest way to the losses that agrees with the plainest, and its name.

    `options` are those of the plan whose packs it is for.
    """
    if layers := _batch_dependent(model):
        logger.warning(
            "BatchNorm without running statistics (%s): a sample's loss depends on the others in "
            "its batch; batch_size=1 scores each alone",
            ", ".join(layers),
        )
    if not isinstance(job.loss, str):
        return callable_method(job.loss, job.device), ""
    if job.loss not in LANGUAGE_LOSSES:
        return prediction_method(job.loss, job.columns, job.device), ""
    few = [sample for sample in job.few if _tokens(sample) <= _CHECKED] or job.few[:1]
    batch = job.collate([few[-1], few[len(few) // 4]])
    longest = longest_alike(model)
    prefix = job.prefix[: options["prefix"]][:longest]
    max_tokens = options["max_tokens"] if len(prefix) else None  # else no pack exceeds it
    why_not = why_not_packed(model, job.loss) or why_batch_not_packed(model, batch)
    whole = padded(job.loss, max_tokens)
    packing = None if why_not else Packing(whole, prefix, max_tokens, job.device)
    compiled = is_compiled(model)
    *ways, (plainest, plain) = methods(
        model,
        job.loss,
        packing=packing,
        max_tokens=max_tokens,
        columns=job.columns,
        compiled=compiled,
        device=job.device,
    )
    if compiled and (reason := agrees(ways[0][1], plain, model, batch, job.dtype)):
        logger.warning("not compiling: %s", reason)
        run_eagerly(model)
        compiled = False
    for name, method in ways:
        reason = agrees(method, plain, model, batch, job.dtype)
        if not reason:
            described = _described(name, options, why_not, job, compiled=compiled)
            return method, described + _alone(longest)
        logger.warning("not scoring by %s: %s", name, reason)
    return plain, plainest


def _batch_dependent(model: nn.Module) -> list[str]:
    """Return the names of a model's BatchNorm layers that have no statistics but the batch's."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]


def _described(
    way: str, options: Mapping[str, Any], why_not_packed: str, job: Job, *, compiled: bool
) -> str:
    """What is said of the way that was chosen."""
    parts = [way, "layers compiled"] if compiled else [way]
    prefix, shared = options["prefix"], options["shared_prompts"]
    if why_not_packed:
        parts.append(f"samples padded ({why_not_packed})")
    elif "packed" in way:
        saved = prefix * (len(job.dataset) - 1)
        parts += [f"a prefix of {prefix:,} tokens run once ({saved:,} tokens saved)"] * bool(prefix)
        parts += [f"shared prompts run once (about {shared:,} tokens saved)"] * bool(shared)
    return ", ".join(parts)


def _alone(longest: int | None) -> str:
    if longest is None:
        return ""
    return (
        f", samples of over {longest:,} tokens one at a time (their rotary frequencies depend on "
        "the length)"
    )


def _tokens(sample: Any) -> int:
    return length_of(sample) or 0


def _kind(device: torch.device) -> str:
    return "cuda" if device.type == "cuda" else "cpu"
