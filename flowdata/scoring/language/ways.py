"""Language models: losses of target tokens, from the fastest way that agrees with the model.

Each way is a method (see tasks.py); `methods` lists them, fastest first. A way prepares a batch

- by packing: without padding, and with a common prefix run once (packed.py);
- or padded, as it was collated (inputs.py);

and runs what it prepared

1. for hidden states of target positions only, through the tiled head of head.py;
2. for the same positions through the model's own head and whatever follows it;
3. for the model's logits of all positions;
4. for the same, one sample at a time.

`agrees` compares a method with the last one. All run the model's own `forward`, and the first two
only change what its output layer sees, so that every architecture's peculiarities stay in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.head.output_layer import Head, finish_logits, logit_options, read_head
from flowdata.head.tiled import kernels, target_values
from flowdata.models.calling import call_with, innermost, output_layer_of
from flowdata.models.rope import loaded_frequencies, longest_alike
from flowdata.models.tensors import CPU
from flowdata.scoring.language.inputs import Prepare, Work, padded, rows_of
from flowdata.scoring.language.packed import Packing
from flowdata.targets.columns import columns_of_logits
from flowdata.targets.predictions import logits_of
from flowdata.targets.target_losses import TargetLosses, Way, joined

_ROWS_AT_ONCE = 256  # of full logits in float32
Run = Callable[[nn.Module, Work], TargetLosses]


def ways_of(
    model: nn.Module,
    loss: str,
    *,
    packing: Packing | None = None,
    max_tokens: int | None = None,
    columns: Sequence[str] = (),
    compiled: bool = False,
    device: torch.device = CPU,
) -> list[tuple[str, Way]]:
    """Return the ways to score a batch, named, fastest first, the plainest last.

    Args:
        model: the model as it is run.
        loss: the language loss's name.
        packing: packs batches, where they can be packed.
        max_tokens: beyond this a padded batch is run in slices.
        columns: names of further columns, see columns.py.
        compiled: the head may be compiled as well.
        device: where the model takes its inputs.
    """
    output_layer = output_layer_of(model)
    config: Any = getattr(innermost(model), "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    runs: list[tuple[str, Run]] = []
    if output_layer is not None:
        head = read_head(output_layer, text_config)
        if head is not None:
            for name, way in kernels(head, compiled=compiled):
                run = _tiled(output_layer, way, columns)
                runs.append((f"target positions through {name}", run))
        gathered = _gathered(output_layer, text_config, columns)
        runs.append(("target positions through the model's head", gathered))
    full_logits = _full_logits(output_layer, text_config, columns)
    longest = longest_alike(model)

    def method(prepare: Prepare, run: Run) -> Way:
        alone = _one_by_one(_way(padded(loss), run, device))
        return _alone_beyond(longest, alone, _way(prepare, run, device))

    ways: list[tuple[str, Way]] = []
    if packing is not None:
        ways += [(f"{name}, samples packed", method(packing, run)) for name, run in runs]
    runs.append(("full logits", full_logits))
    ways += [(name, method(padded(loss, max_tokens), run)) for name, run in runs]
    plain = _one_by_one(_way(padded(loss), full_logits, device))
    return [*ways, ("full logits, one sample at a time", plain)]


def _tiled(output_layer: nn.Module, head: Head, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        with _seeing(output_layer, lambda hidden: hidden.flatten(0, -2)[None, :1]) as seen:
            call_with(model, work.inputs, use_cache=False)
        hidden = work.of_targets(seen[0]).to(head.weight.dtype)
        values, further = target_values(hidden, head, work.targets, columns)
        return TargetLosses(values, work.counts, further)

    return run


def _gathered(output_layer: nn.Module, config: Any, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        with (
            _seeing(output_layer, lambda hidden: work.of_targets(hidden)[None]),
            _last_call(output_layer, wanted="gradient_norm" in columns) as calls,
        ):
            logits = logits_of(call_with(model, work.inputs, use_cache=False))
        call = [(given[0], made[0]) for given, made in calls]
        return _of_logits(logits[0], work.targets, work.counts, columns, call, config)

    return run


def _full_logits(output_layer: nn.Module | None, config: Any, columns: Sequence[str]) -> Run:
    def run(model: nn.Module, work: Work) -> TargetLosses:
        with _last_call(output_layer, wanted="gradient_norm" in columns) as calls:
            logits = logits_of(call_with(model, work.inputs, use_cache=False))
        if logits.shape[:2] != work.shape:
            raise ValueError(
                f"the model gives logits of shape {tuple(logits.shape)} for labels of shape "
                f"{tuple(work.shape)}; they should be (B, T, V) and (B, T). "
                "Pass loss=callable(model, batch)"
            )
        call = [(work.of_targets(given), work.of_targets(made)) for given, made in calls]
        kept = work.of_targets(logits)
        return _of_logits(kept, work.targets, work.counts, columns, call, config)

    return run


def _way(prepare: Prepare, run: Run, device: torch.device) -> Way:
    """Return the method that prepares a batch in one way and runs it in another."""

    def method(model: nn.Module, batch: Any) -> TargetLosses:
        parts = []
        for work in prepare(model, batch):
            _check_vocabulary(model, work)
            with work.around():
                parts.append(run(model, work.on(device)))
        return joined(parts)

    return method


def _check_vocabulary(model: nn.Module, work: Work) -> None:
    """Refuse tokens that the model doesn't have; a GPU would only say that it was aborted."""
    inner = innermost(model)
    embedding = inner.get_input_embeddings() if hasattr(inner, "get_input_embeddings") else None
    if not _takes_more_than_text(inner):  # else ids beyond the vocabulary may stand for images
        _check_tokens("input_ids", work.inputs["input_ids"], embedding, "num_embeddings")
    _check_tokens("labels", work.targets, output_layer_of(model), "out_features")


def _check_tokens(name: str, ids: Tensor, layer: nn.Module | None, size_name: str) -> None:
    size = getattr(layer, size_name, None)
    if size is None:
        return
    outside = ids[(ids < 0) | (ids >= size)]
    if len(outside):
        raise ValueError(
            f"{name} must be tokens of the model, from 0 to {size - 1}, got {int(outside[0])}; "
            "is the tokenizer the model's own?"
        )


def _takes_more_than_text(model: Any) -> bool:
    config: Any = getattr(model, "config", None)
    return hasattr(config, "get_text_config") and config.get_text_config() is not config


def _one_by_one(method: Way) -> Way:
    """Cut a batch into samples without their padding on the right, and run them one by one."""

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        parts = []
        for row in range(len(batch["input_ids"])):
            with loaded_frequencies(model):
                parts.append(method(model, rows_of(batch, row, row + 1)))
        return joined(parts)

    return run


def _alone_beyond(longest: int | None, alone: Way, method: Way) -> Way:
    """Return a method that leaves batches of longer samples than `longest` to `alone`."""
    if longest is None:
        return method

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        is_long = isinstance(batch, Mapping) and batch["input_ids"].shape[1] > longest
        return (alone if is_long else method)(model, batch)

    return run


def _of_logits(
    logits: Tensor,
    targets: Tensor,
    counts: Tensor,
    columns: Sequence[str],
    call: list[tuple[Tensor, Tensor]],
    config: Any,
) -> TargetLosses:
    """Cross-entropies of (n, V) logits and further columns, a few rows in float32 at a time.

    `call` holds what the output layer was given and made, (n, d) and (n, V), where recorded.
    """
    scale, softcap = logit_options(config)
    hidden = next((given for given, _ in call), None)
    for _, made in call:
        _check_logit_options(made, logits, targets, scale, softcap)
    parts = []
    for start in range(0, max(1, len(targets)), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        z, h = logits[rows].float(), None if hidden is None else hidden[rows]
        further = columns_of_logits(z, targets[rows], columns, h, scale=scale, softcap=softcap)
        losses = F.cross_entropy(z, targets[rows], reduction="none")
        parts.append(TargetLosses(losses, counts[:0], further))
    whole = joined(parts)
    return TargetLosses(whole.values, counts, whole.further)


def _check_logit_options(
    made: Tensor, logits: Tensor, targets: Tensor, scale: float, softcap: float | None
) -> None:
    """Raise unless the logits are what the configuration makes of the output layer's values."""
    expected = finish_logits(made.gather(1, targets[:, None]).float(), None, scale, softcap)
    found = logits.gather(1, targets[:, None]).float()
    if not torch.allclose(found, expected, rtol=2e-2, atol=2e-2):
        raise ValueError(
            "the column 'gradient_norm' needs to know how logits follow from the output layer, but "
            "the model does something to them that its configuration doesn't tell; leave it out "
            "of columns"
        )


@contextmanager
def _last_call(layer: nn.Module | None, *, wanted: bool) -> Iterator[list[tuple[Tensor, Tensor]]]:
    """Record what a layer is given and makes, where wanted and where there is one."""
    calls: list[tuple[Tensor, Tensor]] = []
    if layer is None or not wanted:
        yield calls
        return

    def record(_: nn.Module, args: tuple[Tensor, ...], output: Tensor) -> None:
        calls[:] = [(args[0], output)]

    handle = layer.register_forward_hook(record)
    try:
        yield calls
    finally:
        handle.remove()


@contextmanager
def _seeing(layer: nn.Module, replace: Callable[[Tensor], Tensor]) -> Iterator[list[Tensor]]:
    """Record what a layer is given, (B, T, d), and give it `replace` of that instead."""
    seen: list[Tensor] = []

    def swap(_: nn.Module, args: tuple[Tensor, ...]) -> tuple[Tensor, ...]:
        seen.append(args[0])
        return (replace(args[0]), *args[1:])

    handle = layer.register_forward_pre_hook(swap)
    try:
        yield seen
    finally:
        handle.remove()
