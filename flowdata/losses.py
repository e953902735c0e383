"""Weighted training losses: Σ weight · loss over a stated denominator.

Inside, the arithmetic is float32 (float64 stays float64), whatever autocast does around it.
`weighted_mean` and `causal_lm_loss` never wait for the device and compile without graph breaks.
A sample of weight 0 takes no part, even if its loss is NaN: it is left out, not multiplied by 0.

`num_items` makes a loss exact when one optimiser step is spread over accumulated batches or
ranks. It is the denominator of the *whole* step (`count_items` of every batch, summed), divided by
the number of ranks if gradients are averaged over them, as DDP and FSDP do. The losses of the
parts are then summed, not averaged: call backward() on each, with no division by the number of
accumulated batches. `flowdata.accumulation.AccumulatedBatches` does that bookkeeping for any loop.

`kl_to_reference` adds a divergence to the predictions of a reference model, which is a constant.
With ``token_rule="dft"`` that is anchored fine-tuning (ASFT, arXiv:2509.23753)::

    Σ weight · (rule · loss + kl_to_reference · KL(reference ‖ current)) / denominator

The direction is that of the authors' code and of LLaMA-Factory (`use_asft_loss`), where the paper
writes KL(current ‖ reference); it is the one that tells forgetting (`DriftMeter`). Both take the
mean over target tokens, as here without weights, and a strength of 0.1. A LoRA model's base is a
reference that costs one more forward and no second model, in any loop::

    with base_model(model):  # no adapters, no dropout, no gradients
        reference = model(**batch).logits
    loss = causal_lm_loss(
        model(**batch).logits, labels, weights,
        token_rule="dft", kl_to_reference=0.1, reference=reference,
    )
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.real_numbers import RealNumber
from flowdata.head.cross_entropy import cross_entropies
from flowdata.head.fused_loss import (
    head_divergences,
    head_largest_logits,
    head_losses,
    weighted_head_loss,
)
from flowdata.head.kl_logits import kl_of_logits
from flowdata.models.adapters import base_model
from flowdata.models.tensors import to_device
from flowdata.targets.arguments import (
    check_head,
    check_kl,
    check_labels,
    check_losses,
    check_reference,
    check_targets,
    trains,
)
from flowdata.targets.labels import IGNORE_INDEX, next_tokens
from flowdata.targets.target_weights import (
    Normalize,
    check_normalize,
    count_items,
    target_weights,
)
from flowdata.token_weights import LARGEST_LOGITS, TokenRule, looks_at_logits, rule_weights

__all__ = [
    "Normalize",
    "base_model",
    "causal_lm_loss",
    "count_items",
    "fused_causal_lm_loss",
    "target_weights",
    "weighted_mean",
]

_LOGITS = "the reference model's logits (B, T, V), as those under flowdata.losses.base_model(model)"
_HIDDEN = (
    "the reference model's hidden states (B, T, d), or a pair (hidden_states, head) of them and "
    "its output layer"
)


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
    check_losses(losses, weights)
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
    kl_to_reference: RealNumber | None = None,
    reference: Tensor | None = None,
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
        token_rule: weights from the current model's own predictions on top of `weights`:
            ``"talr"``, ``"dft"``, ``"dro"``, ``"eaft"`` or a callable (see
            `flowdata.token_weights`).
        kl_to_reference: ≥ 0, strength of a divergence to `reference`, in nats a target; see the
            module's docstring. `token_rule` does not weigh it.
        reference: (B, T, V) floating, the reference model's logits of the same batch, a constant.
        ignore_index: the label that marks positions without a target.

    Returns:
        0-d, float64 for float64 logits and float32 otherwise; 0 without a target or a weight.

    Raises:
        TypeError: `logits` is not floating, or `labels` is not int64.
        ValueError: the shapes don't fit, only one of `kl_to_reference` and `reference` is given,
            or, on the CPU, a label lies outside the vocabulary.

    Example:
        >>> import torch
        >>> logits = torch.zeros(2, 3, 4)
        >>> labels = torch.tensor([[0, 1, 2], [-100, -100, 3]])
        >>> causal_lm_loss(logits, labels, torch.tensor([1.0, 0.5]))  # log(4) * (2 + 0.5) / 3
        tensor(1.1552)
    """
    check_normalize(normalize)
    check_labels(logits, labels, "logits (B, T, V)")
    strength = check_kl(kl_to_reference, reference, _LOGITS)
    if reference is not None:
        reference = check_reference(reference, logits, _LOGITS)
    labels = to_device(labels, logits.device)
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    targets = next_tokens(labels, ignore_index).flatten()
    # Only the host can look at the labels without waiting for a device, and a compiled graph
    # would break at the look.
    if targets.device.type == "cpu" and not torch.compiler.is_compiling():
        check_targets(targets[targets != ignore_index], logits.shape[-1])
    # Positions without a target are scored on class 0 and left out by their weight of 0: picking
    # the others would give a shape that the host has to wait for.
    rows = logits.reshape(-1, logits.shape[-1])
    losses = cross_entropies(rows, torch.where(targets == ignore_index, 0, targets))
    plain_weights = token_weights = token_weights.to(losses)
    if token_rule is not None:
        values = losses
        if looks_at_logits(token_rule):
            values = rows.detach().topk(min(LARGEST_LOGITS, rows.shape[1]), sorted=False).values
        token_weights = token_weights * rule_weights(token_rule, values, token_weights != 0)
    batch = labels, normalize, ignore_index
    items = _count_batch(token_weights, *batch) if num_items is None else num_items
    loss = _divide(_weighted_sum(losses, token_weights), items)
    if strength == 0 or reference is None:
        return loss
    if num_items is None:
        items = _count_batch(plain_weights, *batch)
    divergences = kl_of_logits(reference.flatten(0, 1), rows)
    return loss + strength * _divide(_weighted_sum(divergences, plain_weights), items)


def fused_causal_lm_loss(
    hidden_states: Tensor,
    head: nn.Module,
    labels: Tensor,
    weights: Tensor | None = None,
    *,
    normalize: Normalize = "count",
    num_items: float | Tensor | None = None,
    token_rule: TokenRule | None = None,
    kl_to_reference: RealNumber | None = None,
    reference: Tensor | tuple[Tensor, nn.Module] | None = None,
    softcap: float | None = None,
    logit_scale: float = 1.0,
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return `causal_lm_loss` of head(hidden_states) without ever holding the logits.

    Positions without a target or of weight 0 never reach the head; to find the others is the only
    time that an accelerator is waited for. The gradients are made along with the loss, so the work
    is that of the full logits, in tiles of 128 MiB; a `token_rule` takes one more pass through the
    head, and a divergence two through each head, in float32. CUDA devices run the same tiles:
    Liger's fused loss is not used, because its gradients under ``reduction="none"`` assume weights
    of 1.

    Args:
        hidden_states: (B, T, d) floating: what the model hands to its head.
        head: d → V. A plain `nn.Linear`, with or without bias, is fused; any other module (an
            adapter, a quantised layer) is called tile by tile, and again in the backward pass.
        labels: as for `causal_lm_loss`, and so are weights, normalize, num_items, token_rule,
            kl_to_reference and ignore_index.
        reference: (B, T, d) floating, the reference model's hidden states (under `base_model`, or
            kept ones), a constant, where `head` is frozen; where it is trained, a pair of them and
            the reference model's own head.
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
    check_labels(hidden_states, labels, "hidden_states (B, T, d)")
    check_head(head)
    strength = check_kl(kl_to_reference, reference, _HIDDEN)
    reference_states, reference_head = _reference_of(reference, head, hidden_states)
    labels = to_device(labels, hidden_states.device)
    targets = next_tokens(labels, ignore_index).flatten()
    token_weights = target_weights(labels, weights, ignore_index=ignore_index).flatten()
    positions = ((targets != ignore_index) & (token_weights != 0)).nonzero().flatten()
    hidden, targets = hidden_states.flatten(0, 1)[positions], targets[positions]
    check_targets(targets, getattr(head, "out_features", None))
    token_weights = token_weights[positions]
    logit_options: Any = {"softcap": softcap, "logit_scale": logit_scale}
    plain_weights = token_weights
    if token_rule is not None:
        if looks_at_logits(token_rule):
            values = head_largest_logits(hidden, head, LARGEST_LOGITS, **logit_options)
        else:
            values = head_losses(hidden, head, targets, **logit_options)
        token_weights = token_weights * rule_weights(token_rule, values, token_weights != 0)
    # The gradients are made in the forward pass, so the denominator has to be known before it:
    # each loss gets its final coefficient, weight / num_items.
    batch = labels, normalize, ignore_index
    items = _count_batch(token_weights, *batch) if num_items is None else num_items
    coefficients = _divide(token_weights, items)
    loss = weighted_head_loss(hidden, head, targets, coefficients, **logit_options)
    if strength == 0 or reference_states is None:
        return loss
    if num_items is None:
        items = _count_batch(plain_weights, *batch)
    base = reference_states.flatten(0, 1)[positions], reference_head
    divergences = head_divergences(*base, hidden, head, **logit_options)
    return loss + strength * (divergences * _divide(plain_weights, items)).sum()


def _reference_of(reference: Any, head: nn.Module, values: Tensor) -> tuple[Any, nn.Module]:
    """Return a reference's hidden states, and the head that they belong to."""
    if reference is None:
        return None, head
    is_pair = isinstance(reference, tuple | list) and len(reference) == 2
    states, reference_head = reference if is_pair else (reference, head)
    states = check_reference(states, values, _HIDDEN)
    check_head(reference_head)
    if trains(head, reference_head):
        raise ValueError(
            "head is trained, so that it is not the reference model's; pass "
            "reference=(hidden_states, head) with the head as it was before training"
        )
    return states, reference_head


def _weighted_sum(losses: Tensor, weights: Tensor) -> Tensor:
    """Return Σ wℓ over the losses whose weight is not 0."""
    # 0 · NaN is NaN, in the sum as in its gradient: a bad loss of weight 0 is replaced beforehand.
    return (torch.where(weights == 0, 0.0, losses) * weights).sum()


def _count_batch(
    token_weights: Tensor, labels: Tensor, normalize: str, ignore_index: int
) -> Tensor:
    """Return the denominator of this batch alone, for a step that has no other."""
    if normalize == "weights":
        return token_weights.sum()
    return count_items(labels, ignore_index=ignore_index)


def _divide(total: Tensor, num_items: float | Tensor) -> Tensor:
    """Return total / num_items; a denominator of 0 counts as 1, as a sum over no items is 0."""
    if isinstance(num_items, Tensor):
        if num_items.numel() != 1:
            raise ValueError(f"num_items must be one number, got shape {tuple(num_items.shape)}")
        items = to_device(num_items, total.device).to(total.dtype).reshape(())
    elif not num_items >= 0:
        raise ValueError(f"num_items must be at least 0, got {num_items}")
    else:
        items = total.new_full((), num_items)  # a kernel fills it: no copy that the host waits for
    return total / torch.where(items == 0, 1.0, items)
