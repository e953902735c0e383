"""The ways to the losses of a language model's target tokens, fastest first.

A way (see flowdata/targets/target_losses.py) prepares a batch, and runs what it prepared:

    prepared                                 run (runs.py)
    packed, a common prefix run once         hidden states of target positions → tiled head
    packed                                   the same positions → the model's own head
    padded, as collated                      target positions → tiled head
    padded                                   target positions → the model's own head
    padded, masks as they are                target positions → either head
    padded                                   logits of all positions

Every way runs the model's own `forward`, so that each architecture's peculiarities stay in; all
but the last only change what its output layer is given. `plain_way` is what they are judged by
(flowdata/scoring/check.py): logits of all positions of a sample that was collated alone.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import torch
from torch import nn

from flowdata.models.as_loaded import as_loaded
from flowdata.models.rope import longest_as_loaded
from flowdata.models.tensors import CPU
from flowdata.scoring.language.inputs import padded, rows_of
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.runs import Run, runs_of
from flowdata.scoring.language.vocabulary import check_vocabulary
from flowdata.scoring.language.work import Prepare
from flowdata.targets.target_losses import TargetLosses, Way, joined


def ways_of(
    model: nn.Module,
    loss: str,
    *,
    packings: Sequence[tuple[str, Packing]] = (),
    max_tokens: int | None = None,
    columns: Sequence[str] = (),
    compiled: bool = False,
    device: torch.device = CPU,
) -> list[tuple[str, Way]]:
    """Return the ways to score a batch, named, fastest first, full logits last.

    Args:
        model: the model as it is run.
        loss: the language loss's name.
        packings: pack batches, where they can be packed, each named; fastest first.
        max_tokens: beyond this a padded batch is run in slices.
        columns: names of further columns, see flowdata/targets/columns.py.
        compiled: the head may be compiled as well.
        device: where the model takes its inputs.
    """
    *fast, (plain_name, plain) = runs_of(model, columns, compiled=compiled)
    sliced = padded(loss, max_tokens)
    way = partial(way_of, model, loss, device=device)
    ways: list[tuple[str, Way]] = []
    for laid_out, packing in packings:
        ways += [(f"{name}, {laid_out}", way(packing, run)) for name, run in fast]
    ways += [(name, way(sliced, run)) for name, run in fast]
    if loss == "causal_lm":
        masked = padded(loss, max_tokens, keep_mask=True)
        as_is = partial(way, masked, keep_mask=True)
        ways += [(f"{name}, masks as they are", as_is(run)) for name, run in fast]
    return [*ways, (plain_name, way(sliced, plain))]


def way_of(
    model: nn.Module,
    loss: str,
    prepare: Prepare,
    run: Run,
    *,
    device: torch.device = CPU,
    keep_mask: bool = False,
) -> Way:
    """Return the way that prepares a batch, and runs what it prepared.

    Args:
        model: the model as it is run.
        loss: the language loss's name.
        prepare: makes work of a batch.
        run: runs it.
        device: where the model takes its inputs.
        keep_mask: of samples that are run one at a time, see `padded`.
    """
    alone = _one_by_one(_prepared(padded(loss, keep_mask=keep_mask), run, device))
    return _alone_beyond(longest_as_loaded(model), alone, _prepared(prepare, run, device))


def plain_way(
    model: nn.Module, loss: str, columns: Sequence[str] = (), device: torch.device = CPU
) -> Way:
    """Return the way of a sample that was collated alone: its fields as they are, full logits."""
    _, run = runs_of(model, columns)[-1]
    return way_alone(loss, run, device)


def way_alone(loss: str, run: Run, device: torch.device = CPU) -> Way:
    """Return the way that runs a sample that was collated alone, its fields as they are."""
    return _prepared(padded(loss, keep_mask=True), run, device)


def _prepared(prepare: Prepare, run: Run, device: torch.device) -> Way:
    """Return the way that prepares a batch by `prepare` and runs each piece of work by `run`."""

    def way(model: nn.Module, batch: Any) -> TargetLosses:
        parts = []
        for work in prepare(model, batch):
            check_vocabulary(model, work)
            with work.around():
                parts.append(run(model, work.on(device)))
        return joined(parts)

    return way


def _one_by_one(way: Way) -> Way:
    """Return the way that cuts a batch into samples, without padding on the right, for `way`."""

    def alone(model: nn.Module, batch: Any) -> TargetLosses:
        parts = []
        for row in range(len(batch["input_ids"])):
            # Each with the model's rotary frequencies as loaded, not as left by a longer sample.
            with as_loaded(model):
                parts.append(way(model, rows_of(batch, row, row + 1)))
        return joined(parts)

    return alone


def _alone_beyond(longest: int | None, alone: Way, way: Way) -> Way:
    """Return the way that leaves batches of samples longer than `longest` to `alone`.

    Such samples' rotary frequencies depend on their length (flowdata/models/rope.py), so that one
    would change the losses of the others in its batch.
    """
    if longest is None:
        return way

    def by_length(model: nn.Module, batch: Any) -> TargetLosses:
        is_long = isinstance(batch, Mapping) and batch["input_ids"].shape[1] > longest
        return (alone if is_long else way)(model, batch)

    return by_length
