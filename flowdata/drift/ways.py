"""Ways to rows: how what an output layer is given is read off a model, for a batch of samples.

    language model     hidden states at the positions that have a target     (targets, d)
    other models       the inputs of the linear layer that makes the logits  (samples, d)
    no such layer      the logits themselves                                 (samples, C)

The ways of one model differ in speed alone, as those to losses do (flowdata/scoring/candidates.py).
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.drift.heads import rows_of_call, told_of_linear_layers
from flowdata.head.output_layer import (
    Head,
    OutputModule,
    added_bias,
    kernels,
    logit_options,
)
from flowdata.models.calling import (
    call_with,
    innermost,
    output_layer_of,
    without_virtual_tokens,
)
from flowdata.models.hooks import last_call
from flowdata.models.tensors import to_device
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.grouping import alike, alone, together
from flowdata.scoring.job import Job
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packable import why_batch_not_packed, why_not_packed
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.runs import Run, hidden_states
from flowdata.scoring.language.ways import way_alone, way_of
from flowdata.scoring.language.work import Work
from flowdata.scoring.plan.packs import Plan
from flowdata.targets.labels import IGNORE_INDEX, split_batch, token_ids_of
from flowdata.targets.predictions import logits_of, predict
from flowdata.targets.target_losses import TargetLosses, Way
from flowdata.targets.which_loss import LANGUAGE_LOSSES, is_hugging_face


def ways_to_rows(job: Job, plan: Plan, model: nn.Module, head: str | None) -> list[Candidate]:
    """Return the ways, fastest first, each sample alone last; their `values` are rows, (n, d).

    Args:
        job: its loss is one of a language model, or stands for all others.
        plan: whose packs the ways are for.
        model: the model as it is run.
        head: the name of the layer that makes the logits, None where there is none.
    """
    ways = ways_in_training(job, model, head, plan.options.max_tokens)
    if job.loss != "causal_lm" or why_not_packed(model, job.loss):
        return ways
    if why_batch_not_packed(model, job.collate(job.few_samples)):
        return ways
    most, prefix = plan.options.max_tokens, job.prefix[: plan.options.prefix]
    packing = Packing(padded(job.loss, most), prefix, most, job.device)
    packed = way_of(model, job.loss, packing, _hidden_run(model), device=job.device)
    return [Candidate("samples packed", packed, together), *ways]


def ways_in_training(
    job: Job, model: nn.Module, head: str | None, max_tokens: int | None = None
) -> list[Candidate]:
    """Return those of `ways_to_rows` that gradients can go back through, which none packed can.

    Args:
        job: see `ways_to_rows`.
        model: see `ways_to_rows`.
        head: see `ways_to_rows`.
        max_tokens: beyond this a padded batch is run in slices.
    """
    if job.loss not in LANGUAGE_LOSSES:
        way = _prediction_way(job, model, head)
        return [
            Candidate("samples together", way, together),
            Candidate("samples of one shape at a time", way, alike),
            Candidate("one sample at a time", way, alone),
        ]
    loss, run = str(job.loss), _hidden_run(model)
    way = way_of(model, loss, padded(loss, max_tokens), run, device=job.device)
    return [
        Candidate("samples padded", way, together),
        Candidate("samples of one length at a time", way, alike),
        Candidate("one sample at a time", way_alone(loss, run, job.device), alone),
    ]


def _hidden_run(model: nn.Module) -> Run:
    layer: Any = output_layer_of(model)

    def run(model: nn.Module, work: Work) -> TargetLosses:
        return TargetLosses(hidden_states(model, layer, work), work.counts)

    return run


def way_to_logits(job: Job, model: nn.Module, head: str | None) -> Way:
    """Return the way of a sample alone to the logits that the model itself makes, (n, C) float32.

    Args:
        job: see `ways_to_rows`.
        model: see `ways_to_rows`.
        head: see `ways_to_rows`.
    """
    if job.loss not in LANGUAGE_LOSSES:
        return _prediction_way(job, model, head, to_logits=True)

    def run(model: nn.Module, work: Work) -> TargetLosses:
        logits = logits_of(call_with(model, work.inputs, use_cache=False))
        logits = without_virtual_tokens(model, logits, work.shape[1])
        return TargetLosses(work.of_targets(logits).float(), work.counts)

    return way_alone(str(job.loss), run, job.device)


def _prediction_way(
    job: Job, model: nn.Module, head: str | None, *, to_logits: bool = False
) -> Way:
    layers = [] if head is None else [model.get_submodule(head)]

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, labels = split_batch(to_device(batch, job.device))
        if head is None:
            rows = _logits(model, inputs)
            return _of_samples(rows, _mask_of(inputs), labels)
        with last_call(layers) as calls:
            logits = predict(model, inputs)
        rows = logits.float() if to_logits else rows_of_call(calls[0], logits, head)
        return _of_samples(rows, _mask_of(inputs), labels)

    return way


def _logits(model: nn.Module, inputs: Any) -> Tensor:
    """A model's logits (B, …, C), which it makes as (B, C), or of places.

    Those of tokens are (B, T, C) or (B, C, T), those of a linear layer (B, …, C), and others
    PyTorch's (B, C, …).
    """
    of_linear = set()
    with told_of_linear_layers(model, lambda _, made: of_linear.add(made.shape)):
        logits = predict(model, inputs).float()
    if logits.dim() == 2:
        return logits
    tokens = token_ids_of(inputs) if logits.dim() == 3 else None
    is_last, is_second = (
        tokens is not None and tokens.shape[1] == places for places in logits.shape[1:3]
    )
    if tokens is None and logits.shape in of_linear:
        is_last, is_second = True, logits.shape == logits.movedim(1, -1).shape
    if is_last and is_second and not is_hugging_face(model):
        raise ValueError(
            f"the model returns logits of shape {tuple(logits.shape)} for as many classes as "
            f"{'places' if tokens is None else 'tokens'}, so that either axis could be the "
            "classes'; measure drift on samples of other lengths"
        )
    is_known = tokens is not None and is_hugging_face(model)  # virtual tokens may come before
    return logits if is_last or (is_known and not is_second) else logits.movedim(1, -1)


def _of_samples(rows: Tensor, mask: Tensor | None, labels: Any) -> TargetLosses:
    """(B, d), or (B, …, d) without what is masked or labelled as no target, as rows of samples."""
    if rows.dim() == 2:
        return TargetLosses(rows, torch.ones(len(rows), dtype=torch.long))
    is_target = torch.ones(rows.shape[:-1], dtype=torch.bool, device=rows.device)
    if mask is not None and mask.shape == rows.shape[:2]:
        is_target &= mask.bool()[(...,) + (None,) * (rows.dim() - 3)]
    if isinstance(labels, Tensor) and labels.shape == rows.shape[:-1]:
        is_target &= labels != IGNORE_INDEX
    return TargetLosses(rows[is_target], is_target.flatten(1).sum(1).cpu())


def _mask_of(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def output_layer(model: nn.Module, loss: Any, head: str | None) -> Head | nn.Module:
    """Return the layer that makes logits of a model's rows, read where it can be.

    Args:
        model: the caller's.
        loss: of the job that read the rows.
        head: the name of the layer that makes the logits, where the loss is none of language.
    """
    module = output_module(model, loss, head)
    layer = module.layer
    if type(layer) is not nn.Linear or layer._forward_hooks or layer._forward_pre_hooks:
        return module
    bias = _sum(_whole(layer.bias), module.bias)
    plain = Head(_whole(layer.weight), bias, module.scale, module.softcap)
    return kernels(plain, compiled=False)[0][1]


def output_module(model: nn.Module, loss: Any, head: str | None) -> OutputModule:
    """Return the layer that makes logits of a model's rows, with what the model does to them.

    Args:
        model: see `output_layer`.
        loss: see `output_layer`.
        head: see `output_layer`.
    """
    if loss not in LANGUAGE_LOSSES:
        return OutputModule(None if head is None else model.get_submodule(head))
    inner = innermost(model)
    config: Any = getattr(inner, "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    return OutputModule(output_layer_of(model), *logit_options(config), added_bias(inner))


def _sum(one: Tensor | None, other: Tensor | None) -> Tensor | None:
    """The sum of two biases, each of which may be missing."""
    if one is None or other is None:
        return one if other is None else other
    return one + other


def _whole(parameter: Any) -> Any:
    """A parameter's values; those of one that is sharded are brought together."""
    if parameter is None:
        return None
    values = parameter.full_tensor() if hasattr(parameter, "full_tensor") else parameter
    return values.detach()
