"""The check: which way to the losses agrees with the plainest one."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowdata._common.notices import logger
from flowdata.models.compiled import is_compiled, run_eagerly
from flowdata.models.rope import longest_alike
from flowdata.scoring.job import Job, tokens_of
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packed import (
    Packing,
    why_batch_not_packed,
    why_not_packed,
)
from flowdata.scoring.language.ways import ways_of
from flowdata.scoring.plan.packs import PlanOptions
from flowdata.scoring.ranks import Ranks
from flowdata.targets.predictions import callable_way, prediction_way
from flowdata.targets.target_losses import Way
from flowdata.targets.which_loss import LANGUAGE_LOSSES

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def agrees(way: Way, plain: Way, model: nn.Module, batch: Any, dtype: torch.dtype) -> str:
    """Return "" if a way gives samples the losses that the plain one gives, else the reason.

    The allowance is the dtype's `TOLERANCE`, absolute below a loss of 1 nat and relative above,
    and wider for samples of few targets, whose rounding errors can't cancel.
    """
    try:
        losses = way(model, batch).columns(token_losses=False)
    except Exception as error:  # whatever it is, another way may do without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    with torch.compiler.set_stance("force_eager"):
        truth = plain(model, batch).columns(token_losses=False)
    if losses["count"].tolist() != truth["count"].tolist():
        return f"it counts {losses['count'].tolist()} targets, not {truth['count'].tolist()}"
    rounding = TOLERANCE[dtype] * (1 + 2 / truth["count"].sqrt())
    for name in set(truth) - {"count", "correct"}:  # a tie may be broken either way
        differences = (losses[name] - truth[name]).abs()
        if (differences > rounding * truth[name].clamp_min(1)).any():  # NaN, no loss, never is
            return f"a sample's {name} differs by {differences.nan_to_num().max():.2g}"
    return ""


_CHECKED = 2048  # tokens of a sample whose full logits are still held for a check


def agreed_way(job: Job, options: PlanOptions, model: nn.Module, ranks: Ranks) -> tuple[Way, str]:
    """Return the way that this rank chooses, and its name.

    Raises:
        ValueError: another rank chose another way, so that losses would depend on who makes them.
    """
    way, name = choose_way(job, options, model)
    if len(set(ranks.gather("way", name))) > 1:
        raise ValueError(
            f"rank {ranks.rank} can score by {name!r}, another rank can't: losses would "
            "depend on who makes them; run on machines of one kind"
        )
    return way, name


def choose_way(job: Job, options: PlanOptions, model: nn.Module) -> tuple[Way, str]:
    """Return the fastest way to the losses that agrees with the plainest, and its name.

    Args:
        job: the job.
        options: those of the plan whose packs the way is for.
        model: the job's model as it is run.
    """
    if layers := _batch_dependent(model):
        logger.warning(
            "BatchNorm without running statistics (%s): a sample's loss depends on the others in "
            "its batch; batch_size=1 scores each alone",
            ", ".join(layers),
        )
    if not isinstance(job.loss, str):
        return callable_way(job.loss, job.device), ""
    if job.loss not in LANGUAGE_LOSSES:
        return prediction_way(job.loss, job.columns, job.device), ""
    return _language_way(job, job.loss, options, model)


def _language_way(job: Job, loss: str, options: PlanOptions, model: nn.Module) -> tuple[Way, str]:
    """Try the ways of language models, fastest first, on two samples of different lengths."""
    few = [sample for sample in job.few if tokens_of(sample) <= _CHECKED] or job.few[:1]
    batch = job.collate([few[-1], few[len(few) // 4]])
    longest = longest_alike(model)
    prefix = job.prefix[: options.prefix][:longest]
    max_tokens = options.max_tokens if len(prefix) else None  # else no pack exceeds it
    why_not = why_not_packed(model, loss) or why_batch_not_packed(model, batch)
    whole = padded(loss, max_tokens)
    packing = None if why_not else Packing(whole, prefix, max_tokens, job.device)
    compiled = is_compiled(model)
    *ways, (plainest, plain) = ways_of(
        model,
        loss,
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
    for name, way in ways:
        reason = agrees(way, plain, model, batch, job.dtype)
        if not reason:
            described = _described(name, options, why_not, job, compiled=compiled)
            return way, described + _alone(longest)
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
    way: str, options: PlanOptions, why_not_packed: str, job: Job, *, compiled: bool
) -> str:
    """What is said of the way that was chosen."""
    parts = [way, "layers compiled"] if compiled else [way]
    prefix, shared = options.prefix, options.shared_prompts
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
