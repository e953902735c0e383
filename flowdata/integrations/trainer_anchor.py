"""Anchors in Hugging Face's Trainer, whatever its loss and its gradient accumulation."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import Any

from torch import Tensor

from flowdata.companions.anchor import ParameterAnchor
from flowdata.drift import OutputAnchor


def add_anchor(trainer: Any, anchor: OutputAnchor | ParameterAnchor) -> None:
    """Let a Trainer add an anchor's penalty to the loss of every step.

    It is for every class of `transformers.Trainer`'s kind: its own, TRL's, `FlowTrainer` and
    `FlowSFTTrainer`. The penalty is divided by the batches of an optimiser step, so that each step
    has it once. Evaluation and the loss that the Trainer logs stay without it.

    Args:
        trainer: made and not trained yet.
        anchor: an `OutputAnchor`, or a `ParameterAnchor` of ``trainer.model``.

    Raises:
        TypeError: `anchor` is no anchor, or `trainer` no Trainer.
        ValueError: the trainer has this anchor already; or, in a step, a `ParameterAnchor` is of
            another model than is trained, as under `model_init`, which makes a new one; or the
            trainer does not go back through its accelerator once, so that the penalty would be
            missing.

    Example:
        >>> add_anchor(trainer, OutputAnchor(meter, strength=0.1))  # doctest: +SKIP
        >>> add_anchor(trainer, ParameterAnchor(trainer.model, "l2", 1e-3))  # doctest: +SKIP
    """
    if not isinstance(anchor, OutputAnchor | ParameterAnchor):
        raise TypeError(
            f"anchor must be an OutputAnchor or a ParameterAnchor, got {type(anchor).__name__}"
        )
    if not hasattr(trainer, "training_step") or not hasattr(trainer, "accelerator"):
        raise TypeError(f"trainer must be a transformers.Trainer, got {type(trainer).__name__}")
    step = trainer.training_step
    if anchor in _anchors_of(step):
        raise ValueError("the trainer has this anchor already, and its penalty would count twice")

    def training_step(model: Any, *args: Any, **kwargs: Any) -> Any:
        _check_model(anchor, model)

        def penalty() -> Tensor:
            # A subclass may put its own autocast there; Accelerate's is in the model's forward.
            with trainer.compute_loss_context_manager():
                value = anchor(model) if isinstance(anchor, OutputAnchor) else anchor()
            share: Tensor = value / trainer.current_gradient_accumulation_steps
            return share

        with _added_once(trainer.accelerator, penalty):
            return step(model, *args, **kwargs)

    training_step.anchors = (*_anchors_of(step), anchor)  # type: ignore[attr-defined]
    trainer.training_step = training_step


def _check_model(anchor: OutputAnchor | ParameterAnchor, model: Any) -> None:
    """Refuse an anchor whose parameters are not those that are trained: it would hold nothing."""
    if isinstance(anchor, ParameterAnchor) and not anchor.is_of(model):
        raise ValueError(
            "the ParameterAnchor is of another model than the one that is trained, and would hold "
            "nothing; make it from the model being trained: pass the Trainer model= instead of "
            "model_init=, which makes a new model in train(), or call add_anchor in the "
            "on_train_begin of a callback"
        )


def _anchors_of(step: Any) -> tuple[Any, ...]:
    """The anchors that a trainer's step has been given."""
    anchors: tuple[Any, ...] = getattr(step, "anchors", ())
    return anchors


@contextmanager
def _added_once(accelerator: Any, penalty: Callable[[], Tensor]) -> Iterator[None]:
    """Add a penalty to the loss that an accelerator goes back from in a block.

    There the loss is divided by all that the Trainer divides it by, which is another number for
    every kind of loss.
    """
    plain, calls = accelerator.backward, 0

    def backward(loss: Tensor, **kwargs: Any) -> Any:
        nonlocal calls
        calls += 1
        value = penalty()
        return plain(loss + value.to(loss.device, loss.dtype), **kwargs)

    accelerator.backward = backward
    try:
        yield
    finally:
        accelerator.backward = plain
    if calls != 1:
        raise ValueError(
            f"the trainer went back through its accelerator {calls} times in a training step, "
            "instead of once, so that the anchor's penalty was not counted once; add it in "
            "compute_loss by hand: loss + anchor(model) / current_gradient_accumulation_steps"
        )
