"""Runs: from prepared work to the losses of its targets, through the model's output layer.

    hidden states (B, T, d) → output layer → logits (B, T, V) → softcap, scale → losses

Three runs of `forward` differ in what the output layer is given, fastest first:

- one position, because `forward` has to end; the hidden states of the target positions go through
  the tiled head, which never holds their logits (flowdata/head);
- the target positions, whose logits the model makes itself;
- all positions, as ever.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.head.output_layer import Head, finish_logits, kernels, logit_options, read_head
from flowdata.head.tiled import target_values
from flowdata.models.calling import (
    call_with,
    innermost,
    output_layer_of,
    without_virtual_tokens,
)
from flowdata.models.hooks import Call, last_call, replaced_input
from flowdata.scoring.language.work import Work
from flowdata.targets.columns import columns_of_logits
from flowdata.targets.predictions import logits_of
from flowdata.targets.target_losses import TargetLosses, joined

_ROWS_AT_ONCE = 256  # of logits that are converted to float32: 256 MiB for 2^18 tokens
Run = Callable[[nn.Module, Work], TargetLosses]  # of a model and work on its device


def runs_of(
    model: nn.Module, columns: Sequence[str] = (), *, compiled: bool = False
) -> list[tuple[str, Run]]:
    """Return the runs that a model allows, named, fastest first, full logits last.

    Args:
        model: the model as it is run.
        columns: names of further columns, see flowdata/targets/columns.py.
        compiled: the head may be compiled as well.
    """
    output_layer = output_layer_of(model)
    config: Any = getattr(innermost(model), "config", None)
    config = config.get_text_config() if hasattr(config, "get_text_config") else config
    runs: list[tuple[str, Run]] = []
    if output_layer is not None:
        head = read_head(output_layer, config)
        if head is not None:
            for name, head_of_kernel in kernels(head, compiled=compiled):
                tiled = _tiled(output_layer, head_of_kernel, columns)
                runs.append((f"target positions through {name}", tiled))
        gathered = _gathered(output_layer, config, columns)
        runs.append(("target positions through the model's head", gathered))
    return [*runs, ("full logits", _full_logits(output_layer, config, columns))]


def _tiled(output_layer: nn.Module, head: Head, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        hidden = hidden_states(model, output_layer, work).to(head.weight.dtype)
        values, further = target_values(hidden, head, work.targets, columns)
        return TargetLosses(values, work.counts, further)

    return run


def hidden_states(model: nn.Module, output_layer: nn.Module, work: Work) -> Tensor:
    """Return what the output layer would be given at the target positions, (n, d).

    Args:
        model: the model as it is run.
        output_layer: the layer that makes its logits; it is run on one position alone, or, where
            the model makes its decoder's inputs of labels and then a loss, on all of them.
        work: the call, on the model's device.

    Raises:
        ValueError: the model makes other positions than those of its labels.
    """
    few = _all_positions if "labels" in work.inputs else _one_position
    with replaced_input(output_layer, few) as originals:
        call_with(model, work.inputs, use_cache=False)
    hidden = originals[0]
    if hidden.dim() == 3:
        hidden = without_virtual_tokens(model, hidden, work.shape[1])
    if hidden.dim() != 3 or hidden.shape[:2] != work.shape:
        raise ValueError(
            f"the output layer is given {tuple(hidden.shape)} for labels of shape "
            f"{tuple(work.shape)}; it should be (B, T, d) and (B, T)"
        )
    return work.of_targets(hidden)


def _one_position(hidden: Tensor) -> Tensor:
    """(B, T, d) to (1, 1, d)."""
    return hidden.flatten(0, -2)[None, :1]


def _all_positions(hidden: Tensor) -> Tensor:
    return hidden


def _gathered(output_layer: nn.Module, config: Any, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        with (
            replaced_input(output_layer, lambda hidden: work.of_targets(hidden)[None]),
            last_call(_recorded(output_layer, columns)) as calls,
        ):
            logits = logits_of(call_with(model, work.inputs, use_cache=False))
        places = torch.arange(logits.shape[1], device=logits.device)
        return _losses_of_logits(logits, places, work, columns, calls, config)

    return run


def _full_logits(output_layer: nn.Module | None, config: Any, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        with last_call(_recorded(output_layer, columns)) as calls:
            logits = logits_of(call_with(model, work.inputs, use_cache=False))
        if logits.dim() == 3:
            logits = without_virtual_tokens(model, logits, work.shape[1])
        if logits.shape[:2] != work.shape:
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(work.shape)}; they should be (B, T, V) and (B, T). "
                "Pass loss=callable(model, batch)"
            )
        return _losses_of_logits(logits, work.places, work, columns, calls, config)

    return run


def _recorded(output_layer: nn.Module | None, columns: Sequence[str]) -> list[nn.Module]:
    """The layers whose call is recorded: the output layer where a gradient's norm needs it."""
    if output_layer is None or "gradient_norm" not in columns:
        return []
    return [output_layer]


def _losses_of_logits(
    logits: Tensor,
    places: Tensor,
    work: Work,
    columns: Sequence[str],
    calls: list[Call],
    config: Any,
) -> TargetLosses:
    """Cross-entropies of logits and further columns, a few rows in float32 at a time.

    Args:
        logits: the model's, (B, T, V).
        places: (n,), where the targets lie among the B·T positions. Rows are taken by them a few at
            a time, since a copy of all n would be as large as the logits.
        work: whose targets they are.
        columns: the further ones.
        calls: what the output layer was given and returned, (B, T, d) and (B, T, V), or nothing
            where no column needs it.
        config: the model's.
    """
    scale, softcap = logit_options(config)
    logits = logits.flatten(0, 1)
    calls = [Call(*map(_rows, call)) for call in calls]
    for call in calls:
        _check_logit_options(call.output, logits, (places, work.targets), scale, softcap)
    parts = []
    few_places, few_targets = places.split(_ROWS_AT_ONCE), work.targets.split(_ROWS_AT_ONCE)
    for rows, targets in zip(few_places, few_targets, strict=True):  # one empty part without any
        few = logits[rows].float()
        inputs = calls[0].input[rows] if calls else None
        further = columns_of_logits(few, targets, columns, inputs, scale=scale, softcap=softcap)
        losses = F.cross_entropy(few, targets, reduction="none")
        parts.append(TargetLosses(losses, work.counts[:0], further))
    whole = joined(parts)
    return TargetLosses(whole.values, work.counts, whole.further, logits.shape[-1])


def _rows(values: Tensor) -> Tensor:
    """(B, T, …) to (B·T, …), which some models make of them before their output layer."""
    return values.flatten(0, 1) if values.dim() == 3 else values


def _check_logit_options(
    output: Tensor,
    logits: Tensor,
    places: tuple[Tensor, Tensor],
    scale: float,
    softcap: float | None,
) -> None:
    """Raise unless the logits are what the configuration makes of the output layer's values.

    Args:
        output: the layer's values, one row for each of the logits, (B·T, V) each.
        logits: the model's.
        places: rows and classes that are compared: the targets alone, since all would be as much
            work again.
        scale: see `finish_logits`.
        softcap: see `finish_logits`.
    """
    if output.shape == logits.shape:
        expected = finish_logits(output[places].float(), None, scale, softcap)
        if torch.allclose(logits[places].float(), expected, rtol=2e-2, atol=2e-2):
            return
    raise ValueError(
        "the column 'gradient_norm' needs to know how logits follow from the output layer, but the "
        "model does something to them that its configuration doesn't tell; leave it out of columns"
    )
