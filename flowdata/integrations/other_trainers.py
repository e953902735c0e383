"""What the mixin refuses of a Trainer with a loss, an order or arguments of its own."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch.utils.data import RandomSampler, SequentialSampler
from transformers import Trainer

from flowdata.integrations.trainer_checks import check_resampling

_REPLACEABLE = (type(None), RandomSampler, SequentialSampler)


def check_data_by_name(init: Callable[..., Any], arguments: tuple[Any, ...]) -> None:
    """Refuse training data that comes by position, where the mixin doesn't see it.

    Args:
        init: what the Trainer's class after the mixin is made by.
        arguments: those that came by position.

    Raises:
        TypeError: `train_dataset` is among them, or they are too many.
    """
    if "train_dataset" in inspect.signature(init).bind_partial(*arguments).arguments:
        raise TypeError(
            "train_dataset came by position; pass it, and what comes after it, by name: "
            "train_dataset=, eval_dataset=, …"
        )


def has_own_loss(trainer_class: type, mixin: type) -> bool:
    """Return whether a Trainer before which the mixin was put computes a loss of its own.

    Args:
        trainer_class: a class made of the mixin and a Trainer.
        mixin: the mixin; a class that overrides its `_weighted_loss` weighs that loss itself.
    """
    order = trainer_class.__mro__
    weighs_it = any("_weighted_loss" in vars(c) for c in order[: order.index(mixin)])
    return not weighs_it and _owner_of("compute_loss", trainer_class, mixin) is not Trainer


def check_own_loss(trainer_class: type, mixin: type, *, loss: Any, auto: bool) -> None:
    """Refuse weights where the loss is the Trainer's own, such as a preference loss.

    Args:
        trainer_class: a class made of the mixin and a Trainer.
        mixin: the mixin.
        loss: a callable is the user's own loss of each sample, which takes the Trainer's place.
        auto: whether the weights were to be made by ``scores="auto"``.

    Raises:
        ValueError: the Trainer's loss would be replaced in silence.
    """
    if not has_own_loss(trainer_class, mixin):
        return
    owner = _owner_of("compute_loss", trainer_class, mixin)
    name, is_of_trl = owner.__name__, owner.__module__.startswith("trl.")
    if name == "SFTTrainer" and is_of_trl:
        raise ValueError(
            "SFTTrainer computes its loss in a head of its own, which FlowTrainerMixin alone can't "
            "weigh; use flowdata.integrations.trl.FlowSFTTrainer"
        )
    if not callable(loss) or is_of_trl:
        other = (
            "" if is_of_trl else ", or pass loss=(outputs, batch) -> (B,), the loss of each sample"
        )
        score = "score with flowdata.LossScorer, and " if auto else ""
        raise ValueError(
            f"{name} computes a loss of its own, which weights can't reach; {score}pass "
            f"resample=True, which draws samples by their weights and leaves {name}'s loss as it "
            f"is{other}"
        )


def adopt_order(trainer: Any, sampler: Any) -> None:
    """Make a Trainer ready for another order than its own sampler's, or refuse it.

    KTOTrainer keeps the order in which it prepared the data, since each sample holds the reply of
    the one before it in its batch, for an estimate of the divergence. In another order these
    replies are taken from the batch as it is drawn.

    Args:
        trainer: the Trainer; its collator may be replaced.
        sampler: the sampler that it would use.

    Raises:
        ValueError: the sampler groups or repeats samples, which another order would undo; or
            something was computed beforehand that depends on the order.
    """
    calculates_divergence = getattr(trainer, "calculate_KL", False)
    if not calculates_divergence:
        check_resampling(trainer.args)
    if not isinstance(sampler, _REPLACEABLE):
        raise ValueError(
            f"resample=True would replace {type(trainer).__name__}'s {type(sampler).__name__}, "
            "which groups or repeats samples for the sake of its loss; draw before training: "
            "train_dataset=dataset.select(list(flowdata.FlowSampler(scores)))"
        )
    if calculates_divergence:
        if getattr(trainer.args, "precompute_ref_log_probs", False):
            raise ValueError(
                "resample=True with precompute_ref_log_probs=True would take divergences from the "
                "order before it; set precompute_ref_log_probs=False"
            )
        trainer.data_collator = _NeighboursReplies(trainer.data_collator)


class _NeighboursReplies:
    """KTOTrainer's collator on samples that hold the reply of the one before them in the batch."""

    def __init__(self, collator: Any) -> None:
        self.collator = collator

    def __call__(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        replies = [sample["completion_ids"] for sample in samples]
        rotated = [replies[-1], *replies[:-1]]
        pairs = zip(samples, rotated, strict=True)
        return self.collator([{**s, "KL_completion_ids": reply} for s, reply in pairs])


def _owner_of(method: str, trainer_class: type, mixin: type) -> type:
    """The class after the mixin whose method comes into play."""
    order = trainer_class.__mro__
    return next(c for c in order[order.index(mixin) + 1 :] if method in vars(c))
