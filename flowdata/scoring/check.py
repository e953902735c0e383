"""The check: which way to the losses agrees with the plainest one."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import nn

from flowdata._common.notices import logger
from flowdata.models.compiled import is_compiled, run_eagerly
from flowdata.models.rope import longest_alike
from flowdata.scoring.job import Job, tokens_of
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packable import why_batch_not_packed, why_not_packed
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.ways import ways_of
from flowdata.targets.predictions import callable_way, prediction_way
from flowdata.targets.target_losses import Way
from flowdata.targets.which_loss import LANGUAGE_LOSSES

TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def agrees(method: Way, plain: Way, model: nn.Module, batch: Any, dtype: torch.dtype) -> str:
    """Return "" if a method gives samples the losses that the plain one gives, else the reason.

    The allowance is the dtype's `TOLERANCE`, absolute below a loss of 1 nat and relative above,
    and wider for samples of few targets, whose rounding errors can't cancel.
    """
    try:
        found = method(model, batch).columns(token_losses=False)
    except Exception as error:  # whatever it is, another way may do without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    with torch.compiler.set_stance("force_eager"):
        wanted = plain(model, batch).columns(token_losses=False)
    if found["count"].tolist() != wanted["count"].tolist():
        return f"it counts {found['count'].tolist()} targets, not {wanted['count'].tolist()}"
    rounding = TOLERANCE[dtype] * (1 + 2 / wanted["count"].sqrt())
    for name in set(wanted) - {"count", "correct"}:  # a tie may be broken either way
        differences = (found[name] - wanted[name]).abs()
        if (differences > rounding * wanted[name].clamp_min(1)).any():  # NaN, no loss, never is
            return f"a sample's {name} differs by {differences.nan_to_num().max():.2g}"
    return ""


_CHECKED = 2048  # tokens of a sample whose full logits are still held for a check


def choose_way(job: Job, model: nn.Module, options: Mapping[str, Any]) -> tuple[Way, str]:
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
        return callable_way(job.loss, job.device), ""
    if job.loss not in LANGUAGE_LOSSES:
        return prediction_way(job.loss, job.columns, job.device), ""
    few = [sample for sample in job.few if tokens_of(sample) <= _CHECKED] or job.few[:1]
    batch = job.collate([few[-1], few[len(few) // 4]])
    longest = longest_alike(model)
    prefix = job.prefix[: options["prefix"]][:longest]
    max_tokens = options["max_tokens"] if len(prefix) else None  # else no pack exceeds it
    why_not = why_not_packed(model, job.loss) or why_batch_not_packed(model, batch)
    whole = padded(job.loss, max_tokens)
    packing = None if why_not else Packing(whole, prefix, max_tokens, job.device)
    compiled = is_compiled(model)
    *ways, (plainest, plain) = ways_of(
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
