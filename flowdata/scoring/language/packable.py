"""What can be packed: models and batches, plain attention, and first tokens that samples share."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.calling import innermost
from flowdata.scoring.language.inputs import inputs_and_targets
from flowdata.targets.labels import IGNORE_INDEX

_SAFE_LAYERS = {"full_attention", "sliding_attention"}  # others, such as linear ones, mix tokens
# Tokens from which a prefix or prompt is run apart: what sees it needs a mask and copies of keys.
# Of the time of a forward pass 2 tokens saved 1 %, 8 tokens 5 to 13 % (40 samples of up to 200 and
# 60 tokens, a Llama of 4 layers of width 256 in bfloat16, on one core of an AMD EPYC).
LEAST_SHARED = 8


def why_not_packed(model: nn.Module, loss: str) -> str:
    """Return "" if a model's layers can be trusted with packed samples, else the reason.

    The model has to take positions from `position_ids` and attention from Hugging Face's
    `AttentionInterface`, and nothing else in it may mix tokens.
    """
    inner = innermost(model)
    if loss != "causal_lm":
        return f"{loss} is not causal"
    if not _model_class(inner).__module__.startswith("transformers."):
        return f"{type(inner).__name__} is not one of transformers' own models"
    if not getattr(inner, "_supports_attention_backend", False):
        return f"{type(inner).__name__} has an attention of its own"
    if "position_ids" not in inspect.signature(inner.forward).parameters:
        return f"{type(inner).__name__} takes no position_ids"
    config = inner.config.get_text_config()
    if inner.config.is_encoder_decoder or getattr(inner, "_is_stateful", False):
        return f"{type(inner).__name__} is more than a decoder of attention layers"
    kinds = set(getattr(config, "layer_types", None) or ()) - _SAFE_LAYERS
    if kinds:
        return f"{type(inner).__name__} has layers of kind {', '.join(sorted(kinds))}"
    return ""


def has_plain_attention(model: nn.Module) -> bool:
    """Return whether layers weigh keys by a softmax alone, without a cap on scores or a sink.

    The others make their scores one by one, see `blocks.AttentionOptions`.
    """
    config = innermost(model).config.get_text_config()
    has_sinks = any(name.endswith(".sinks") for name, _ in model.named_parameters())
    return getattr(config, "attn_logit_softcapping", None) is None and not has_sinks


def _model_class(model: Any) -> type:
    """The class that somebody wrote: FSDP makes one of torch's own from it."""
    return next(cls for cls in type(model).__mro__ if not cls.__module__.startswith("torch."))


def why_batch_not_packed(model: nn.Module, batch: Any) -> str:
    """Return "" if a batch of samples can become one flat sequence, else the reason.

    It can if the model takes nothing of it but tokens. A mask that only padding on the right
    needs is left out (see `inputs_and_targets`); one that padding on the left needs, or padding
    that predicts a target, is not.
    """
    inputs, _ = inputs_and_targets(model, batch, "causal_lm")
    parameters = inspect.signature(innermost(model).forward).parameters
    fields = [name for name in inputs if name in parameters and name != "input_ids"]
    return f"samples have {', '.join(fields)}" if fields else ""


def common_prefix(batch: Any, loss: str) -> Tensor:
    """Return the tokens with which all samples of a batch begin, (P,) int64.

    The prefix ends before the first position whose hidden state a target needs. It is empty where
    fewer than `LEAST_SHARED` tokens are shared.
    """
    if loss != "causal_lm" or not isinstance(batch, Mapping) or "input_ids" not in batch:
        return torch.empty(0, dtype=torch.long)
    inputs, targets = inputs_and_targets(nn.Identity(), batch, loss)
    ids: Tensor = inputs["input_ids"]
    is_shared = (ids == ids[:1]).all(0) & (targets == IGNORE_INDEX).all(0)
    if "attention_mask" in batch:
        mask = batch["attention_mask"]
        if getattr(mask, "shape", None) != ids.shape:
            return ids[0, :0].clone()  # it hides tokens from some of the others alone
        is_shared &= (mask != 0).all(0)
    return ids[0, : shared_length(is_shared)].clone()


def shared_length(is_shared: Tensor) -> int:
    """Return how many positions from the first on are shared, 0 where they are too few to gain.

    Args:
        is_shared: (T,) bool.
    """
    length = int(is_shared.long().cumprod(0).sum())  # the product is 0 from the first False on
    return length if length >= LEAST_SHARED else 0
