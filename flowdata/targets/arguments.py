"""What a weighted loss is given, refused where it can't be right."""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.real_numbers import check_factor
from flowdata.models.tensors import to_device


def check_losses(losses: Tensor, weights: Tensor) -> None:
    """Refuse losses without one weight for each."""
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
    # Elsewhere the host would wait for it, and compiled code can't branch by it.
    is_at_hand = weights.device.type == "cpu" and not torch.compiler.is_compiling()
    if is_at_hand and bool((weights < 0).any()):
        raise ValueError(f"weights must be >= 0, got {float(weights.min())}")


def check_labels(values: Tensor, labels: Tensor, name: str) -> None:
    """Refuse labels that are not those of (B, T, …) values."""
    if not values.is_floating_point():
        raise TypeError(f"{name} must be floating, got dtype {values.dtype}")
    if labels.dtype != torch.int64:
        raise TypeError(f"labels must be int64 token ids, got dtype {labels.dtype}")
    if values.dim() != 3 or labels.shape != values.shape[:2]:
        raise ValueError(
            f"labels must be (B, T) for {name}, unshifted; got {tuple(labels.shape)} "
            f"for {tuple(values.shape)}"
        )


def check_head(head: nn.Module) -> None:
    """Refuse an output layer that can't be run tile by tile."""
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


def check_targets(targets: Tensor, size: int | None) -> None:
    """Refuse targets outside a vocabulary of a size, which may be unknown."""
    outside = targets < 0 if size is None else (targets < 0) | (targets >= size)
    if outside.any():
        raise ValueError(
            f"labels must lie in [0, {size}) or be ignore_index, got "
            f"{int(targets[outside][0])}; is the model that of this tokenizer?"
        )


def check_kl(strength: Any, reference: Any, needs: str) -> float:
    """Return the strength of a divergence to a reference, 0 where there is none.

    Args:
        strength: `kl_to_reference`, or None.
        reference: what the divergence is to, or None.
        needs: what the reference has to be, in words.

    Raises:
        ValueError: one of the two comes without the other, or the strength is no number ≥ 0.
    """
    if strength is None:
        if reference is not None:
            raise ValueError(
                "reference would be ignored without kl_to_reference=, the strength of the "
                "divergence to it (0.1 in ASFT)"
            )
        return 0.0
    number = check_factor("kl_to_reference", strength)
    if reference is None:
        raise ValueError(f"kl_to_reference={number:g} needs reference=, {needs}")
    return number


def check_reference(reference: Any, values: Tensor, needs: str) -> Tensor:
    """Return the logits or hidden states of a reference, on the device of the model's own.

    Args:
        reference: of the reference model.
        values: (B, T, …) of the model in training.
        needs: what the reference has to be, in words.

    Raises:
        TypeError: it is no floating tensor.
        ValueError: it is of other positions.
    """
    if not isinstance(reference, Tensor) or not reference.is_floating_point():
        got = reference.dtype if isinstance(reference, Tensor) else repr(reference)
        raise TypeError(f"reference must be {needs}, got {got}")
    if reference.dim() != 3 or reference.shape[:2] != values.shape[:2]:
        raise ValueError(
            f"reference must be {needs}, of the same positions as {tuple(values.shape)}, got "
            f"{tuple(reference.shape)}"
        )
    on_device: Tensor = to_device(reference.detach(), values.device)
    return on_device


def trains(head: nn.Module, reference_head: nn.Module) -> bool:
    """Return whether the head of a reference changes when a head is trained."""
    trained = {id(parameter) for parameter in head.parameters() if parameter.requires_grad}
    return any(id(parameter) in trained for parameter in reference_head.parameters())
