"""Weighted training losses: Σ weight · loss over a stated denominator.

Inside, the arithmetic is float32 (float64 stays float64), whatever autocast does around it.
`weighted_mean` and `causal_lm_loss` never wait for the device and compile without graph breaks.
A sample of weight 0 takes no part, even if its loss is NaN: it is left out, not multiplied by 0.

`num_items` makes a loss exact when one optimiser step is spread over accumulated batches or
ranks. It is the denominator of the *whole* step (`count_items` of every batch, summed), divided by
the number of ranks if gradients are averaged over them, as DDP and FSDP do. The losses of the
parts are then summed, not averaged: call backward() on each, with no division by the number of
accumulated batches. `flowdata.accumulation.AccumulatedBatches` does that bookkeeping for any loop.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from flowdata.head.cross_entropy import cross_entropies
from flowdata.head.fused_loss import head_losses, weighted_head_loss
from flowdata.models.tensors import to_device
from flowdata.targets.labels import IGNORE_INDEX, next_tokens
from flowdata.targets.target_weights import (
    Normalize,
    check_normalize,
    count_items,
    target_weights,
)
from flowdata.token_weights import TokenRule, rule_weights

__all__ = [
    "Normalize",
    "causal_lm_loss",
    "count_items",
    "fused_causal_lm_loss",
    "target_weights",
    "weighted_mean",
]


def weighted_mean(
    losses: Tensor,
    weights: Tensor,
    *,
    normalize: Normalize = "count",
    num_items: float | Tensor | None = None,
) -> Tensor:
    """Return Σ wℓ / N, the FLOW objective, or Σ wℓ / Σ w.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797, Algorithm 1 (``"count"``). The two differ
    by the mean weight, usually around 0.4: a learning rate tuned for one does not fit the other.

    Args:
        losses: (B,) floating, or any other shape: one loss for each weight.
        weights: the shape of `losses`, >= 0; moved to the device of `losses` if needed.
        normalize: ``"count"`` divides by the number of losses (those of weight 0 included),
            ``"weights"`` by the sum of the weights.
        num_items: the denominator of the whole optimiser step, in the unit that `normalize` names,
            in place of this batch's own (see the module's docstring).

    Returns:
        0-d, float64 for float64 losses and float32 otherwise; 0 if all weights are 0.

    Raises:
        TypeError: not a tensor, or `losses` is not floating.
        ValueError: the shapes differ (nothing is broadcast), or `losses` is 0-d.

    Example:
        >>> import torch
        >>> losses = torch.tensor([1.0, 3.0, float("nan")])
        >>> weighted_mean(losses, torch.tensor([1.0, 0.5, 0.0]))
        tensor(0.8333)
    """
    check_normalize(normalize)
    _check_losses(losses, weights)
    losses = losses.to(torch.promote_types(losses.dtype, torch.float32))
    weights = to_device(weights, losses.device).to(losses.dtype)
    if num_items is None:
        num_items = weights.sum() if normalize == "weights" else float(losses.numel())
    return _divide(_weighted_sum(losses, weights), num_items)


def causal_lm_loss(
    logits: Tensor,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "count",
    num_items: float | Tensor | None = None,
    token_rule: TokenRule | None = None,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return the weighted next-token cross-entropy, Σ wℓ over the target tokens / denominator.

    Source: Sanyal et al., ICML 2025, arXiv:2502.02797: the weighted token losses of a batch are
    divided by the number of its target tokens (``"count"``).

    Args:
        logits: (B, T, V) floating; position t predicts label t + 1.
        labels: (B, T) int64, *unshifted*, as Hugging Face models take them; `ignore_index` where
            there is no target. The first label of a row has no prediction and is never a target.
        weights: None for all ones; (B,), one per sequence; or (B, T), one per label (weights[b, t]
            belongs to labels[b, t]). Moved to the device of `logits` if needed.
        normalize: ``"count"`` divides by the number of target tokens (those of weight 0 included),
            ``"weights"`` by the sum of the weights over target tokens.
        num_items: the denominator of the whole optimiser step (see the module's docstring). HF's
            `num_items_in_batch` is that of ``"count"``, summed over accumulated batches and, with
            `average_tokens_across_devices`, over ranks: divide it by the number of ranks.
        token_rule: weights from the current model's own token losses on top of `weights`:
            ``"talr"``, ``"dft"``, ``"dro"`` or a callable (see `flowdata.token_weights`).
        ignore_index: the label that marks positions without a target.

    Returns:
        0-d, float64 for float64 logits and float32 otherwise; 0 without a target or a weight.

    Raises:
        TypeError: `logits` is not floating, or `labels` is not int64.
        ValueError: the shapes don't fit, or, on the CPU, a label lies outside the vocabulary.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4)
        >>> labels = torch.tensor([[0, 1, 2], [-100, -100, 3]])
        >>> causal_lm_loss(logits, labels, torch.tensor([1.0, 0.5]))  # log(4) * (2 + 0.5) / 3
        tensor(1.1552)
    """
    check_normalize(normalize)
    _check_labels(logits, labels, "logits (B, T, V)")
    labels = to_device(labels, logits.device)
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    targets = next_tokens(labels, ignore_index).flatten()
    # Only the host can look at the labels without waiting for a device, and a compiled graph
    # would break at the look.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        _check_targets(targets[targets != ignore_index], logits.shape[-1])
    # Positions without a target are scored on class 0 and left out by their weight of 0: picking
    # the others would give a shape that the host has to wait for.
    losses = cross_entropies(
        logits.reshape(-1, logits.shape[-1]), torch.where(targets == ignore_index, 0, targets)
    )
    token_weights = token_weights.to(losses)
    if token_rule is not None:
        token_weights = token_weights * rule_weights(token_rule, losses, token_weights != 0)
    if num_items is None:
        num_items = _count_batch(labels, token_weights, normalize, ignore_index)
    return _divide(_weighted_sum(losses, token_weights), num_items)


def fused_causal_lm_loss(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "count",
    num_items: float | Tensor | None = None,
    token_rule: TokenRule | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return `causal_lm_loss` of head(hidden_states) without ever holding the logits.

    Positions without a target or of weight 0 never reach the head; to find the others is the only
    time that an accelerator is waited for. The gradients are made along with the loss, so the work
    is that of the full logits, in tiles of 128 MiB; a `token_rule` takes one more pass through the
    head. CUDA devices run the same tiles: Liger's fused loss is not used, because its gradients
    under ``reduction="none"`` assume weights of 1.

    Args:
        hidden_states: (B, T, d) floating: what the model hands to its head.
        head: d → V. A plain `nn.Linear`, with or without bias, is fused; any other module (an
            adapter, a quantised layer) is called tile by tile, and again in the backward pass.
        labels: as for `causal_lm_loss`, and so are weights, normalize, num_items, token_rule and
            ignore_index.
        softcap: logits become softcap · tanh(logits / softcap), after `logit_scale` (Gemma 2).
        logit_scale: factor on the logits (Cohere; the inverse of Granite's `logits_scaling`).

    Returns:
        0-d, float64 for float64 hidden states and float32 otherwise; 0 without a target or a
        weight.

    Raises:
        TypeError: `hidden_states` is not floating, `labels` is not int64, or the head's weight
            is sharded (a DTensor): compute the loss inside the model's forward, where FSDP has
            gathered it.
        ValueError: the shapes don't fit, or a label lies outside the vocabulary.

    Example:
        >>> import torch
        >>> head = torch.nn.Linear(8, 4, bias=False)
        >>> _ = torch.nn.init.zeros_(head.weight)
        >>> labels = torch.tensor([[0, 1, 2], [-100, -100, 3]])
        >>> loss = fused_causal_lm_loss(torch.ones(2, 3, 8), head, labels, torch.tensor([1.0, 0.5]))
        >>> round(loss.item(), 4)
        1.1552
    """
    check_normalize(normalize)
    _check_labels(hidden_states, labels, "hidden_states (B, T, d)")
    _check_head(head)
    labels = to_device(labels, hidden_states.device)
    targets = next_tokens(labels, ignore_index).flatten()
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    positions = ((targets != ignore_index) & (token_weights != 0)).nonzero().flatten()
    hidden, targets = hidden_states.flatten(0, 1)[positions], targets[positions]
    _check_targets(targets, getattr(head, "out_features", None))
    token_weights = token_weights[positions]
    if token_rule is not None:
        losses = head_losses(hidden, head, targets, softcap=softcap, logit_scale=logit_scale)
        token_weights = token_weights * rule_weights(token_rule, losses, token_weights != 0)
    if num_items is None:
        num_items = _count_batch(labels, token_weights, normalize, ignore_index)
    # The gradients are made in the forward pass, so the denominator has to be known before it:
    # each loss gets its final coefficient, weight / num_items.
    coefficients = _divide(token_weights, num_items)
    return weighted_head_loss(
        hidden, head, targets, coefficients, softcap=softcap, logit_scale=logit_scale
    )


def _weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return Σ wℓ over the losses whose weight is not 0."""
    # 0 · NaN is NaN, in the sum as in its gradient: a bad loss of weight 0 is replaced beforehand.
    return (torch.where(weights == 0, 0.0, losses) * weights).sum()


def _count_batch(
    labels: Tensor, token_weights: Tensor, normalize: str, ignore_index: int
) -> Tensor:
    """Return the denominator of this batch alone, for a step that has no other."""
    if normalize == "weights":
        return token_weights.sum()
    return count_items(labels, ignore_index=ignore_index)


def _divide(total: Tensor, num_items: float | Tensor) -> Tensor:
    """Return total / num_items; a denominator of 0 counts as 1, as a sum over no items is 0."""
    if isinstance(num_items, Tensor):
        items = to_device(num_items, total.device).to(total.dtype)
    else:
        items = total.new_full((), num_items)  # a kernel fills it: no copy that the host waits for
    return total / torch.where(items == 0, 1.0, items)


def _check_losses(losses: Tensor, weights: Tensor) -> None:
    if not isinstance(losses, Tensor):
        raise TypeError(f"losses must be a tensor, got {type(losses).__name__}")
    if not losses.is_floating_point():
        raise TypeError(f"losses must be floating, got dtype {losses.dtype}")
    if losses.dim() == 0:
        raise ValueError(
            "losses must hold one loss per weight, got a 0-d tensor: a model's own `.loss` is "
            "already averaged and can't be weighted; pass the per-sample losses "
            "(reduction='none'), or use flowdata.causal_lm_loss(outputs.logits, labels, weights)"
        )
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    if losses.shape != weights.shape:
        is_per_sample = weights.dim() == 1 and len(losses) == len(weights)
        remedy = (
            ". Make one loss of each sample first, or, of a language model, use "
            "flowdata.causal_lm_loss(logits, labels, weights)"
        )
        raise ValueError(
            f"weights must have the shape of losses, {tuple(losses.shape)}, got "
            f"{tuple(weights.shape)}; nothing is broadcast{remedy if is_per_sample else ''}"
        )


def _check_labels(values: Tensor, labels: Tensor, name: str) -> None:
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating, got dtype {values.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 token ids, got dtype {labels.dtype}")
    if values.dim() != 3 or labels.shape != values.shape[:2]:
        raise ValueError(
            f"labels must be (B, T) for {name}, unshifted; got {tuple(labels.shape)} "
            f"for {tuple(values.shape)}"
        )


def _check_head(head: nn.Module) -> None:
    if not isinstance(head, nn.Module):
        raise TypeError(
            "head must be a module, such as a model's `get_output_embeddings()`, got "
            f"{type(head).__name__}"
        )
    if hasattr(getattr(head, "weight", None), "full_tensor"):
        raise TypeError(
            "head's weight is sharded (a DTensor): compute the loss inside the model's forward, "
            "where FSDP has gathered it, or use causal_lm_loss on the logits"
        )


def _check_targets(targets: Tensor, size: int | None) -> None:
    outside = targets < 0 if size is None else (targets < 0) | (targets >= size)
    if outside.any():
        raise ValueError(
            f"labels must lie in [0, {size}) or be ignore_index, got "
            f"{int(targets[outside][0])}; is the model that of this tokenizer?"
        )
