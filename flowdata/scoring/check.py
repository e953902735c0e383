"""The check: which way to the losses agrees with the plainest one.

A fast way is trusted with a model only after it has given two samples the losses that the plainest
way gives them: full logits, one sample at a time. Whatever a model does that a fast way doesn't
know of (a scaled head, an attention of its own) shows in that comparison.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from flowdata._common.notices import logger
from flowdata.models.compiled import is_compiled, run_eagerly
from flowdata.models.rope import longest_alike
from flowdata.scoring.job import Job
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packable import why_batch_not_packed, why_not_packed
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.ways import ways_of
from flowdata.scoring.plan.lengths import length_of
from flowdata.scoring.plan.packs import PlanOptions
from flowdata.scoring.ranks import Ranks
from flowdata.targets.predictions import callable_way, prediction_way
from flowdata.targets.target_losses import Way
from flowdata.targets.which_loss import LANGUAGE_LOSSES

# How far losses may lie apart: in nats below a loss of 1 nat, as a share of the loss above.
TOLERANCE = {torch.float64: 1e-4, torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}
_LONGEST_CHECKED = 2048  # tokens of a sample whose full logits still fit into memory


def agreed_way(job: Job, options: PlanOptions, model: nn.Module, ranks: Ranks) -> tuple[Way, str]:
    """Return the way that all ranks choose, and its description.

    Raises:
        ValueError: another rank chose another way, so that losses would depend on who makes them.
    """
    way, description = choose_way(job, options, model)
    if len(set(ranks.gather("way", description))) > 1:
        raise ValueError(
            f"rank {ranks.rank} can score by {description!r}, another rank can't: losses would "
            "depend on who makes them; run on machines of one kind"
        )
    return way, description


def choose_way(job: Job, options: PlanOptions, model: nn.Module) -> tuple[Way, str]:
    """Return the fastest way to the losses that agrees with the plainest, and its description.

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
    batch = _batch_to_check(job)
    why_padded = why_not_packed(model, loss) or why_batch_not_packed(model, batch)
    compiled = is_compiled(model)
    *ways, (plainest, plain) = _ways(job, loss, options, model, pack=not why_padded)
    if compiled and (reason := disagreement(ways[0][1], plain, model, batch, job.dtype)):
        # The fastest way may fail on account of the compiled layers: it is tried without them.
        logger.warning("not compiling: %s", reason)
        run_eagerly(model)
        compiled = False
    for name, way in ways:
        reason = disagreement(way, plain, model, batch, job.dtype)
        if not reason:
            layers = ", layers compiled" if compiled else ""
            return way, name + layers + _describe_samples(job, options, name, why_padded, model)
        logger.warning("not scoring by %s: %s", name, reason)
    return plain, plainest


def _batch_to_check(job: Job) -> Any:
    """A longer and a shorter sample in one batch, so that padding and packing both show."""
    samples = [sample for sample in job.few_samples if (length_of(sample) or 0) <= _LONGEST_CHECKED]
    samples = samples or job.few_samples[:1]
    return job.collate([samples[-1], samples[len(samples) // 4]])


def _ways(
    job: Job, loss: str, options: PlanOptions, model: nn.Module, *, pack: bool
) -> list[tuple[str, Way]]:
    """The ways of language models, named, fastest first, the plainest last."""
    prefix = job.prefix[: options.prefix][: longest_alike(model)]
    # Packs are cut by lengths without the prefix. A pack whose samples don't share it after all is
    # larger than planned, and is run in slices. Without a prefix no pack is larger than planned.
    max_tokens = options.max_tokens if len(prefix) else None
    packing = Packing(padded(loss, max_tokens), prefix, max_tokens, job.device) if pack else None
    return ways_of(
        model,
        loss,
        packing=packing,
        max_tokens=max_tokens,
        columns=job.columns,
        compiled=is_compiled(model),
        device=job.device,
    )


def disagreement(way: Way, plain: Way, model: nn.Module, batch: Any, dtype: torch.dtype) -> str:
    """Return "" if a way gives samples the losses that the plain one gives, else how they differ.

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
    # One target may be off by three times the tolerance, the mean of many by hardly more than it.
    rounding = TOLERANCE[dtype] * (1 + 2 / truth["count"].sqrt())
    for name in set(truth) - {"count", "correct"}:  # a tie may be broken either way
        differences = (losses[name] - truth[name]).abs()
        # A sample without a loss is NaN in both, and no comparison with NaN is true.
        if (differences > rounding * truth[name].clamp_min(1)).any():
            return f"a sample's {name} differs by {differences.nan_to_num().max():.2g}"
    return ""


def _batch_dependent(model: nn.Module) -> list[str]:
    """Return the names of a model's BatchNorm layers that have no statistics but the batch's."""
    return [
        name or type(module).__name__
        for name, module in model.named_modules()
        if isinstance(module, nn.modules.batchnorm._BatchNorm) and module.running_mean is None
    ]


def _describe_samples(
    job: Job, options: PlanOptions, way: str, why_padded: str, model: nn.Module
) -> str:
    """How samples are laid out, as it is added to the name of a way."""
    parts = [""]
    if why_padded:
        parts.append(f"samples padded ({why_padded})")
    elif "packed" in way:
        prefix, shared = options.prefix, options.shared_prompts
        if prefix:
            saved = prefix * (len(job.dataset) - 1)
            parts.append(f"a prefix of {prefix:,} tokens run once ({saved:,} tokens saved)")
        if shared:
            parts.append(f"shared prompts run once (about {shared:,} tokens saved)")
    if (longest := longest_alike(model)) is not None:
        parts.append(
            f"samples of over {longest:,} tokens one at a time (their rotary frequencies depend "
            "on the length)"
        )
    return ", ".join(parts)
