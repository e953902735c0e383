"""Weighted training losses: Σ weight · loss over a stated denominator.

Arithmetic is float32 inside (float64 stays float64), whatever autocast does around it; nothing
here waits for the device, and everything compiles without graph breaks. A sample of weight 0
takes no part, even if its loss is NaN: it is left out, not multiplied by 0.

`num_items` makes a loss exact when one optimiser step is spread over accumulated batches or
ranks: it is the denominator of the *whole* step (`count_items` of every batch, summed), divided by
the number of ranks if gradients are averaged over them, as DDP and FSDP do. Losses of the parts
are then summed, not averaged: backward() on each, with no division by the accumulation steps.
`flowdata.accumulation.AccumulatedBatches` does that bookkeeping for any loop.
"""

from __future__ import annotations

from typing import Any, Literal, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata.head.fused_loss import head_losses, weighted_head_loss
from flowdata.targets.labels import next_tokens
from flowdata.token_weights import TokenRule, rule_weights

Normalize: TypeAlias = Literal["count", "weights"]


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
    _check_normalize(normalize)
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
        raise ValueError(
            f"weights must have the shape of losses, {tuple(losses.shape)}, "
            f"got {tuple(weights.shape)}; nothing is broadcast"
        )
    losses = losses.to(_compute_dtype(losses))
    weights = weights.to(losses)
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
    ignore_index: int = -100,
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
    _check_normalize(normalize)
    _check_labels(logits, labels, "logits (B, T, V)")
    labels = labels.to(logits.device)
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    targets = next_tokens(labels, ignore_index).flatten()
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():  # nothing to wait for
        _check_targets(targets[targets != ignore_index], logits.shape[-1])
    losses = _CrossEntropy.apply(  # type: ignore[no-untyped-call]
        logits.reshape(-1, logits.shape[-1]),
        torch.where(targets == ignore_index, 0, targets),
    )
    token_weights = token_weights.to(losses)
    if token_rule is not None:
        token_weights = token_weights * _ruled(token_rule, losses, token_weights != 0)
    if num_items is None:
        num_items = _own_items(labels, token_weights, normalize, ignore_index)
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
    ignore_index: int = -100,
) -> Tensor:
    """Return `causal_lm_loss` of head(hidden_states) without ever holding the logits.

    Positions without a target or of weight 0 never reach the head; finding the others is the
    one point where an accelerator is waited for. Gradients are made along with the loss, so the
    work is that of the full logits, in tiles of 128 MiB; a `token_rule` takes one more pass
    through the head. On CUDA the same tiles run there; Liger's
    fused loss is not used, as its ``reduction="none"`` gradients assume weights of 1.

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
    _check_normalize(normalize)
    _check_labels(hidden_states, labels, "hidden_states (B, T, d)")
    _check_head(head)
    labels = labels.to(hidden_states.device)
    targets = next_tokens(labels, ignore_index).flatten()
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    kept = ((targets != ignore_index) & (token_weights != 0)).nonzero().flatten()
    hidden, targets = hidden_states.flatten(0, 1)[kept], targets[kept]
    _check_targets(targets, getattr(head, "out_features", None))
    token_weights = token_weights[kept]
    if token_rule is not None:
        losses = head_losses(hidden, head, targets, softcap=softcap, logit_scale=logit_scale)
        token_weights = token_weights * _ruled(token_rule, losses, token_weights != 0)
    if num_items is None:
        num_items = _own_items(labels, token_weights, normalize, ignore_index)
    coefficients = _divide(token_weights, num_items)
    return weighted_head_loss(
        hidden, head, targets, coefficients, softcap=softcap, logit_scale=logit_scale
    )


def count_items(
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "count",
    ignore_index: int = -100,
) -> Tensor:
    """Return what `causal_lm_loss` divides by: target tokens, or the sum of their weights.

    Sum it over the batches (and ranks) of one optimiser step to get `num_items`.

    Args:
        labels: (B, T) int64, unshifted.
        weights: None, (B,) or (B, T), as for `causal_lm_loss`.
        normalize: ``"count"`` or ``"weights"``.
        ignore_index: the label that marks positions without a target.

    Returns:
        0-d, int64 for ``"count"`` and floating for ``"weights"``.

    Example:
        >>> import torch
        >>> count_items(torch.tensor([[5, 6, 7], [-100, -100, 8]]))
        tensor(3)
    """
    _check_normalize(normalize)
    if normalize == "count":
        return (labels[:, 1:] != ignore_index).sum()
    return target_weights(labels, weights, ignore_index=ignore_index).sum()


def target_weights(
    labels: Tensor, weights: Tensor | None = None, *, ignore_index: int = -100
) -> Tensor:
    """Return the weight of what each position predicts, (B, T) floating; 0 where nothing is.

    Args:
        labels: (B, T) int64, unshifted.
        weights: None for all ones, (B,) per sequence or (B, T) per label.
        ignore_index: the label that marks positions without a target.

    Raises:
        ValueError: `weights` has another shape.
    """
    is_target = next_tokens(labels, ignore_index) != ignore_index
    if weights is None:
        return is_target.to(torch.float32)
    if not isinstance(weights, Tensor):
        raise TypeError(f"weights must be a tensor, got {type(weights).__name__}")
    weights = weights.to(labels.device, _compute_dtype(weights))
    if weights.shape == labels.shape[:1]:
        moved = weights[:, None]
    elif weights.shape == labels.shape:
        moved = F.pad(weights[:, 1:], (0, 1))
    else:
        raise ValueError(
            f"weights must be (B,) = {tuple(labels.shape[:1])}, one per sequence, or (B, T) = "
            f"{tuple(labels.shape)}, one per label; got {tuple(weights.shape)}"
        )
    return torch.where(is_target, moved, 0.0)


def _weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Σ wℓ, without what weighs 0: 0 · NaN is NaN, in the sum and in its gradient."""
    return (torch.where(weights == 0, 0.0, losses) * weights).sum()


class _CrossEntropy(torch.autograd.Function):
    """Cross-entropies of (n, V) logits and (n,) targets, exact and cheap where weights follow.

    Against `F.cross_entropy`: rows whose loss is not used get a gradient of 0 even if their
    logits are NaN, and one buffer of the logits' size is made in each direction, not two.
    """

    @staticmethod
    def forward(ctx: Any, logits: Tensor, targets: Tensor) -> Tensor:
        columns = targets[:, None]
        values = logits.to(_compute_dtype(logits))
        log_sums = values.logsumexp(1)
        ctx.save_for_backward(logits, log_sums, columns)
        return log_sums - values.gather(1, columns).squeeze(1)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, None]:
        logits, log_sums, columns = ctx.saved_tensors
        factors = gradients[0][:, None]
        values = logits.to(log_sums.dtype)
        if torch.is_grad_enabled():  # create_graph=True: somebody differentiates this again
            scaled = (values.softmax(1) * factors).scatter_add(1, columns, -factors)
            return scaled.masked_fill(factors == 0, 0.0).to(logits.dtype), None
        scaled = (values - log_sums[:, None]).exp_().mul_(factors)
        scaled.scatter_add_(1, columns, -factors)
        return scaled.masked_fill_(factors == 0, 0.0).to(logits.dtype), None


def _ruled(rule: TokenRule, losses: Tensor, takes_part: Tensor) -> Tensor:
    """A rule's weights, 0 where nothing takes part: there the rule may have made anything."""
    return torch.where(takes_part, rule_weights(rule, losses, takes_part), 0.0)


def _own_items(labels: Tensor, token_weights: Tensor, normalize: str, ignore_index: int) -> Tensor:
    if normalize == "weights":
        return token_weights.sum()
    return count_items(labels, ignore_index=ignore_index)


def _divide(total: Tensor, num_items: float | Tensor) -> Tensor:
    """total / num_items, and 0 where there is nothing to divide by."""
    items = torch.as_tensor(num_items, dtype=total.dtype, device=total.device)
    return total / torch.where(items == 0, 1.0, items)


def _compute_dtype(values: Tensor) -> torch.dtype:
    return torch.float64 if values.dtype == torch.float64 else torch.float32


def _check_normalize(normalize: str) -> None:
    if normalize not in ("count", "weights"):
        raise ValueError(
            f"normalize must be 'count' (the paper: divide by their number) or 'weights' "
            f"(divide by the sum of the weights), got {normalize!r}"
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
