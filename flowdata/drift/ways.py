"""Ways to rows: how what an output layer is given is read off a model, for a batch of samples.

    language model     hidden states at the positions that have a target     (targets, d)
    other models       the inputs of the linear layer that makes the logits  (samples, d)
    no such layer      the logits themselves                                 (samples, C)

The ways of one model differ in speed alone, as those to losses do (flowdata/scoring/candidates.py).
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.head.output_layer import (
    Head,
    OutputModule,
    added_bias,
    kernels,
    logit_options,
)
from flowdata.models.calling import (
    call_in_order,
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
from flowdata.targets.labels import split_batch, token_ids_of
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
        inputs = to_device(split_batch(batch)[0], job.device)
        with last_call(layers) as calls:
            logits = predict(model, inputs)
        if head is None:
            rows = _classes_last(model, logits.float(), inputs)
        elif to_logits:
            rows = logits.float()
        else:
            rows = calls[0].input
            _check_unchanged(model, head, calls[0].output, logits)
        return _of_samples(rows, _mask_of(inputs))

    return way


def _check_unchanged(model: nn.Module, head: str, made: Any, logits: Tensor) -> None:
    """Raise ValueError where a model changes what its output layer made, be it of one sample."""
    if made is logits or not isinstance(made, Tensor) or made.shape != logits.shape:
        return
    if not _same(made, logits):
        raise ValueError(
            f"the model's logits are not what its output layer {head!r} makes of a row: it changes "
            "them afterwards, as a scale, a bias or a bound of its own does; so its drift can't be "
            "measured from what the layer is given"
        )


def _classes_last(model: nn.Module, logits: Tensor, inputs: Any) -> Tensor:
    """Logits (B, …, C), of (B, C), of tokens' (B, T, C) or (B, C, T), or of PyTorch's (B, C, …)."""
    if logits.dim() == 2:
        return logits
    tokens = token_ids_of(inputs) if logits.dim() == 3 else None
    is_last, is_second = (
        tokens is not None and tokens.shape[1] == places for places in logits.shape[1:3]
    )
    if is_last and is_second and not is_hugging_face(model):
        raise ValueError(
            f"the model returns logits of shape {tuple(logits.shape)} for as many classes as "
            "tokens, so that either axis could be the classes'; measure drift on samples of other "
            "lengths"
        )
    is_known = tokens is not None and is_hugging_face(model)  # virtual tokens may come before
    return logits if is_last or (is_known and not is_second) else logits.movedim(1, -1)


def _of_samples(rows: Tensor, mask: Tensor | None) -> TargetLosses:
    """(B, d), or (B, T, d) without what is masked, as rows of samples."""
    if rows.dim() == 2:
        return TargetLosses(rows, torch.ones(len(rows), dtype=torch.long))
    places = rows.flatten(1, -2)  # (B, T, d)
    if mask is None or mask.shape != places.shape[:2]:
        counts = torch.full((len(places),), places.shape[1])
        return TargetLosses(places.flatten(0, 1), counts)
    return TargetLosses(places[mask.bool()], mask.bool().sum(1).cpu())


def _mask_of(inputs: Any) -> Tensor | None:
    mask = inputs.get("attention_mask") if isinstance(inputs, Mapping) else None
    return mask if isinstance(mask, Tensor) and mask.dim() == 2 else None


def name_of_head(model: nn.Module, batch: Any, device: torch.device) -> str | None:
    """Return the name of the linear layer whose output the logits are, None where there is none.

    Args:
        model: the model as it is run.
        batch: of samples that are no targets of a language model.
        device: where the model takes its inputs.

    Raises:
        ValueError: the model returns no logits, or several tensors that could be meant.
    """
    inputs = to_device(split_batch(batch)[0], device)
    with _outputs_of_linear_layers(model) as outputs:
        output = (
            call_with(model, inputs)
            if isinstance(inputs, Mapping)
            else call_in_order(model, inputs)
        )
    try:
        logits = logits_of(output)
    except ValueError as error:
        raise ValueError(
            f"{type(model).__name__} returns no logits by which it could be compared "
            f"({str(error).partition(';')[0]}); put it into a module that returns them, of shape "
            "(B, …, C), under the name `logits`"
        ) from error
    names = [
        name
        for name, output in outputs.items()
        if output.shape == logits.shape and _same(output, logits)
    ]
    return names[-1] if names else None


def _same(output: Tensor, logits: Tensor) -> bool:
    """Whether both have the same values; a model that diverged has some that are no numbers."""
    return torch.equal(output.float().nan_to_num(), logits.float().nan_to_num())


@contextmanager
def _outputs_of_linear_layers(model: nn.Module) -> Iterator[dict[str, Tensor]]:
    """What linear layers, also those with adapters, return last in a block, by name."""
    outputs: dict[str, Tensor] = {}

    def record(name: str) -> Any:
        def hook(_: nn.Module, __: Any, output: Any) -> None:
            outputs.pop(name, None)
            if isinstance(output, Tensor):
                outputs[name] = output

        return hook

    layers = [
        (name, module)
        for name, module in model.named_modules()
        if isinstance(module, nn.Linear) or hasattr(module, "base_layer")
    ]
    handles = [module.register_forward_hook(record(name)) for name, module in layers]
    try:
        yield outputs
    finally:
        for handle in handles:
            handle.remove()


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
