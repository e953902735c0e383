"""The base model under a PEFT model's adapters: what there is of it, and running it."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import torch

from flowdata.models.calling import in_evaluation, is_peft_model, unwrapped


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
    check_base(model)
    peft_model = unwrapped(model)
    # PEFT marks all adapters as trained when it turns them on again, the frozen ones included.
    flags = [(parameter, parameter.requires_grad) for parameter in peft_model.parameters()]
    try:
        with torch.no_grad(), in_evaluation(model), peft_model.disable_adapter():
            _check_frozen(peft_model, flags)
            yield
    finally:
        for parameter, flag in flags:
            parameter.requires_grad_(flag)


def check_base(model: Any) -> None:
    """Refuse a model without adapters that can be turned off to get the pre-trained model.

    Raises:
        ValueError: it is no PEFT model, its adapters are merged, or they hold a part of the
            pre-trained weights.
    """
    model = unwrapped(model)
    if not is_peft_model(model) or not hasattr(model, "disable_adapter"):
        raise ValueError(
            "the base model is a PEFT model's with its adapters turned off, got "
            f"{type(model).__name__}; train adapters (peft.get_peft_model), hold the model to what "
            "it was on a probe with flowdata.OutputAnchor, or keep the hidden states of the frozen "
            "model and pass them to flowdata.losses.fused_causal_lm_loss"
        )
    if any(getattr(module, "merged", False) for module in model.modules()):
        raise ValueError(
            "the adapters are merged into the base model's weights, and turning them off would "
            "take them out; call model.unmerge_adapter() first"
        )
    if not starts_as_base(model):
        raise ValueError(
            "this initialisation of the adapters moved a part of the base model's weights into "
            "them, so that the model without adapters is not the pre-trained one; initialise them "
            "with init_lora_weights=True"
        )


def starts_as_base(model: Any) -> bool:
    """Return whether the pre-trained model is a PEFT model with its adapters off.

    Some initialisations move a part of the base model's weights into the adapters, so that only
    both together are the pre-trained model.
    """
    configs = getattr(model, "peft_config", None)
    if not isinstance(configs, Mapping) or not hasattr(model, "disable_adapter"):
        return False
    starts = [getattr(config, "init_lora_weights", True) for config in configs.values()]
    return all(not isinstance(start, str) or start == "gaussian" for start in starts)


def _check_frozen(model: Any, flags: list[tuple[torch.nn.Parameter, bool]]) -> None:
    """Refuse a base model that is trained: with adapters off, PEFT marks them as frozen."""
    trained = {id(parameter) for parameter, flag in flags if flag and parameter.requires_grad}
    for name, parameter in model.named_parameters():
        if id(parameter) in trained and "prompt_encoder" not in name:
            raise ValueError(
                f"{name} is trained beside the adapters, so the base model under them changes and "
                "is no reference; freeze it, or train it as one of modules_to_save"
            )
