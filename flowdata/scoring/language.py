"""Language models: losses of target tokens, from the fastest way that agrees with the model.

Each way is a method (see tasks.py) over a padded batch; `methods` lists them, fastest first:

1. hidden states of target positions only, through the tiled head of head.py;
2. the same positions through the model's own head and whatever follows it;
3. the model's logits of all positions;
4. the same, one sample at a time.

`agrees` compares a method with the last one. The first two run the model's own `forward` and
only change what its output layer sees, so that every architecture's peculiarities stay in.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.scoring.head import Head, read_head, target_losses
from flowdata.scoring.tasks import (
    IGNORE_INDEX,
    Method,
    TargetLosses,
    call_with,
    innermost,
    logits_of,
)

_ROWS_AT_ONCE = 256  # of full logits in float32
TOLERANCE = {torch.float32: 1e-4, torch.bfloat16: 5e-2, torch.float16: 1e-2}


def methods(model: nn.Module, loss: str) -> list[tuple[str, Method]]:
    """Return the ways to score a batch, named, fastest first, the plainest last."""
    output_layer = _output_layer(model)
    config: Any = getattr(innermost(model), "config", None)
    text_config = config.get_text_config() if hasattr(config, "get_text_config") else config
    ways: list[tuple[str, Method]] = []
    if output_layer is not None:
        head = read_head(output_layer, text_config)
        if head is not None:
            ways.append(("target positions through a tiled head", _tiled(output_layer, head, loss)))
        ways.append(("target positions through the model's head", _gathered(output_layer, loss)))
    ways.append(("full logits", _full_logits(loss)))
    ways.append(("full logits, one sample at a time", _one_by_one(_full_logits(loss))))
    return ways


def agrees(method: Method, plain: Method, model: nn.Module, batch: Any, dtype: torch.dtype) -> str:
    """Return "" if a method gives samples the losses that the plain one gives, else the reason.

    The allowance is the dtype's `TOLERANCE`, absolute below a loss of 1 nat and relative above,
    and wider for samples of few targets, whose rounding errors can't cancel.
    """
    try:
        found = method(model, batch).columns(token_losses=False)
    except Exception as error:  # whatever it is, another way may do without
        return f"{type(error).__name__}: {error}".splitlines()[0]
    wanted = plain(model, batch).columns(token_losses=False)
    if found["count"].tolist() != wanted["count"].tolist():
        return f"it counts {found['count'].tolist()} targets, not {wanted['count'].tolist()}"
    allowed = TOLERANCE[dtype] * wanted["loss"].clamp_min(1) * (1 + 2 / wanted["count"].sqrt())
    differences = (found["loss"] - wanted["loss"]).abs()
    if (differences > allowed).any():  # NaN, a sample without a loss, never is
        return f"a sample's loss differs by {differences.nan_to_num().max():.2g}"
    return ""


def inputs_and_targets(model: nn.Module, batch: Any, loss: str) -> tuple[dict[str, Any], Tensor]:
    """Return a model's inputs and, for each of its output positions, the target or −100.

    Labels are as Hugging Face gives them: unshifted for causal models. Without labels every
    token that is not padding is a target.
    """
    if not isinstance(batch, Mapping) or "input_ids" not in batch:
        raise ValueError(
            f"loss={loss!r} needs batches that are mappings with 'input_ids' and 'labels', got "
            f"{type(batch).__name__}; pass a collate_fn that makes them, or loss=callable"
        )
    inputs = {key: value for key, value in batch.items() if key != "labels"}
    labels = _labels(batch, loss)
    if loss == "causal_lm":
        labels = F.pad(labels[:, 1:], (0, 1), value=IGNORE_INDEX)
        inputs = _without_right_padding_mask(inputs)
    elif loss == "seq2seq_lm" and "decoder_input_ids" not in inputs:
        inputs["decoder_input_ids"] = _decoder_inputs(innermost(model), labels)
    return inputs, labels


def _tiled(output_layer: nn.Module, head: Head, loss: str) -> Method:
    def run(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, labels = inputs_and_targets(model, batch, loss)
        is_target = labels != IGNORE_INDEX
        with _seeing(output_layer, lambda hidden: hidden.flatten(0, -2)[None, :1]) as seen:
            call_with(model, inputs, use_cache=False)
        hidden = seen[0][is_target].to(head.weight.dtype)
        return TargetLosses(target_losses(hidden, head, labels[is_target]), is_target.sum(1))

    return run


def _gathered(output_layer: nn.Module, loss: str) -> Method:
    def run(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, labels = inputs_and_targets(model, batch, loss)
        is_target = labels != IGNORE_INDEX
        with _seeing(output_layer, lambda hidden: hidden[is_target][None]):
            logits = logits_of(call_with(model, inputs, use_cache=False))
        return TargetLosses(_losses(logits[0], labels[is_target]), is_target.sum(1))

    return run


def _full_logits(loss: str) -> Method:
    def run(model: nn.Module, batch: Any) -> TargetLosses:
        inputs, labels = inputs_and_targets(model, batch, loss)
        is_target = labels != IGNORE_INDEX
        logits = logits_of(call_with(model, inputs, use_cache=False))
        if logits.shape[:2] != labels.shape:
            raise ValueError(
                f"loss={loss!r}: the model gives logits of shape {tuple(logits.shape)} for "
                f"labels of shape {tuple(labels.shape)}; they should be (B, T, V) and (B, T). "
                "Pass loss=callable(model, batch)"
            )
        return TargetLosses(_losses(logits[is_target], labels[is_target]), is_target.sum(1))

    return run


def _one_by_one(method: Method) -> Method:
    """Cut a batch into samples without their padding on the right, and run them one by one."""

    def run(model: nn.Module, batch: Any) -> TargetLosses:
        size = len(batch["input_ids"])
        parts = [method(model, _sample_of(batch, index, size)) for index in range(size)]
        return TargetLosses(
            torch.cat([part.values for part in parts]), torch.cat([part.counts for part in parts])
        )

    return run


def _sample_of(batch: Mapping[str, Any], index: int, size: int) -> dict[str, Any]:
    fields = {
        key: value[index : index + 1]
        for key, value in batch.items()
        if isinstance(value, Tensor | list) and len(value) == size
    }
    mask = fields.get("attention_mask")
    if isinstance(mask, Tensor) and mask.dim() == 2:
        width, length = mask.shape[1], int(mask.nonzero()[:, 1].max()) + 1 if mask.any() else 1
        for key, value in fields.items():
            if isinstance(value, Tensor) and value.dim() == 2 and value.shape[1] == width:
                fields[key] = value[:, :length]
    return fields


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """(n,) float32 cross-entropies of (n, V) logits, a few rows in float32 at a time."""
    losses = torch.empty(len(targets), dtype=torch.float32, device=logits.device)
    for start in range(0, len(targets), _ROWS_AT_ONCE):
        rows = slice(start, start + _ROWS_AT_ONCE)
        losses[rows] = F.cross_entropy(logits[rows].float(), targets[rows], reduction="none")
    return losses


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


def _output_layer(model: nn.Module) -> nn.Module | None:
    inner = innermost(model)
    if not hasattr(inner, "get_output_embeddings"):
        return None
    layer = inner.get_output_embeddings()
    return layer if isinstance(layer, nn.Module) else None


def _labels(batch: Mapping[str, Any], loss: str) -> Tensor:
    if "labels" in batch:
        labels: Tensor = batch["labels"]
        return labels
    if loss != "causal_lm":
        raise ValueError(f"loss={loss!r} needs 'labels' in every sample, −100 where nothing counts")
    ids: Tensor = batch["input_ids"]
    mask = batch.get("attention_mask")
    return ids if mask is None else ids.masked_fill(mask == 0, IGNORE_INDEX)


def _without_right_padding_mask(inputs: dict[str, Any]) -> dict[str, Any]:
    """Drop a mask that causality makes needless; else count positions from the first real token.

    No position of a causal model sees padding to its right, and without a mask attention takes
    its fastest kernel.
    """
    mask = inputs.get("attention_mask")
    if mask is None or mask.dim() != 2:
        return inputs
    if bool((mask[:, 1:] <= mask[:, :-1]).all()):
        return {key: value for key, value in inputs.items() if key != "attention_mask"}
    if "position_ids" in inputs:
        return inputs
    return inputs | {"position_ids": (mask.long().cumsum(1) - 1).clamp_min(0)}


def _decoder_inputs(model: Any, labels: Tensor) -> Tensor:
    if hasattr(model, "prepare_decoder_input_ids_from_labels"):
        shifted: Tensor = model.prepare_decoder_input_ids_from_labels(labels=labels)
        return shifted
    raise ValueError(
        "loss='seq2seq_lm' needs 'decoder_input_ids' in the batch: the model can't make them"
    )
