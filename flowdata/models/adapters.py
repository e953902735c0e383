"""The base model under a PEFT model's adapters: what there is of it, and running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Set
from contextlib import contextmanager
from typing import Any

import torch

from flowdata.models.calling import is_peft_model, unwrapped
from flowdata.models.evaluation import as_it_was, in_evaluation

# Initialisations of LoRA, by their names in PEFT, that leave the weights beneath as they are.
_PLAIN_STARTS = ("gaussian", "orthogonal", "eva", "mica")


@contextmanager
def base_model(model: Any) -> Iterator[None]:
    """Make a PEFT model its base model for a block: no adapters, no dropout and no gradients.

    The block gives the reference of a loss with `kl_to_reference`. Adapters, modes and what has a
    gradient are as before after it::

        with base_model(model):
            reference = model(**batch).logits

    Args:
        model: a PEFT model, also inside DistributedDataParallel or `torch.compile`.

    Raises:
        ValueError: the model has no base model that stays as it is, see `check_base`.
    """
    peft_model = unwrapped(model)
    _check(peft_model, _changed_by_its_kind(peft_model))
    with torch.no_grad(), in_evaluation(model), _adapters_off(peft_model) as trained:
        _check(peft_model, trained)
        yield


def check_base(model: Any) -> None:
    """Refuse a model without adapters that can be turned off to get the pre-trained model.

    Raises:
        ValueError: see `why_no_base`.
    """
    _check(unwrapped(model), why_no_base(model))


def why_no_base(model: Any) -> str:
    """Return "" where a model with its adapters off is the pre-trained one, else why it is not.

    It is no PEFT model, its adapters are merged, or they hold a part of the pre-trained weights, or
    parts of the model beneath them are trained or repeated.
    """
    model = unwrapped(model)
    reason = _changed_by_its_kind(model)
    if not reason:
        with _adapters_off(model) as reason:
            pass
    return reason


def has_plain_start(config: Any) -> bool:
    """Return whether an adapter began beside the base model's weights, and left them as they were.

    Some initialisations move a part of the base model's weights into the adapters, so that only
    both together are the pre-trained model.

    Args:
        config: the adapter's, of PEFT.
    """
    start = getattr(config, "init_lora_weights", True)
    return not isinstance(start, str) or start.lower() in _PLAIN_STARTS


def _check(model: Any, reason: str) -> None:
    """Raise ValueError with a reason, if there is one, and with what to do without adapters."""
    if reason and not _has_adapters(model):
        reason += (
            "; train adapters (peft.get_peft_model), hold the model to what it was on a probe with "
            "flowdata.OutputAnchor, or keep the hidden states of the frozen model and pass them to "
            "flowdata.losses.fused_causal_lm_loss"
        )
    if reason:
        raise ValueError(reason)


def _has_adapters(model: Any) -> bool:
    is_peft = is_peft_model(model) and isinstance(model.peft_config, Mapping)
    return is_peft and hasattr(model, "disable_adapter")


def _changed_by_its_kind(model: Any) -> str:
    """Why adapters of a kind leave no base model beneath them, "" if they do."""
    if not _has_adapters(model):
        return (
            "the base model is a PEFT model's with its adapters turned off, got "
            f"{type(model).__name__}"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        return (
            "the adapters are merged into the base model's weights, and turning them off would "
            "take them out; call model.unmerge_adapter() first"
        )
    for config in model.peft_config.values():
        if not has_plain_start(config):
            return (
                "this initialisation of the adapters moved a part of the base model's weights into "
                "them, so that the model without adapters is not the pre-trained one; initialise "
                "them with init_lora_weights=True"
            )
        if getattr(config, "kasa_config", None):
            return (
                "kasa_config cut the smallest singular values off the base model's weights, so "
                "that the model without adapters is not the pre-trained one; leave it out"
            )
        if getattr(config, "layer_replication", None):
            return (
                "layer_replication repeats layers of the base model, so that the model without "
                "adapters is not the pre-trained one; leave it out"
            )
        if (bias := getattr(config, "bias", "none")) != "none":
            return (
                f"with bias={bias!r} a layer's own bias is trained beside the adapters, so the "
                "base model under them changes and is no reference; make the adapters with "
                "bias='none'"
            )
    return ""


@contextmanager
def _adapters_off(model: Any) -> Iterator[str]:
    """Turn a PEFT model's adapters off for a block, and say what of the base model is trained."""
    trained_names = {name for name, each in model.named_parameters() if each.requires_grad}
    with as_it_was(model), model.disable_adapter():
        yield _trained_beside(model, trained_names)


def _trained_beside(model: Any, trained_names: Set[str]) -> str:
    """Why a base model is none that stays, "" if it is frozen: PEFT froze the adapters now off."""
    for name, parameter in model.named_parameters():
        if name in trained_names and parameter.requires_grad and "prompt_encoder" not in name:
            return (
                f"{name} is trained beside the adapters, so the base model under them changes and "
                "is no reference; freeze it, or train it as one of modules_to_save"
            )
    return ""
