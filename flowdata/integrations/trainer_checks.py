"""What a Trainer on the weights refuses at construction: options that can't be right together."""

from __future__ import annotations

from typing import Any

from flowdata.integrations.trainer_loss import SampleLoss
from flowdata.losses import Normalize
from flowdata.token_weights import TokenRule


def check_data(
    dataset: Any, scores: Any, key: str, *, carried: bool, resample: bool, rule: TokenRule | None
) -> None:
    """Refuse training data with two weights for a sample, or with none.

    Args:
        dataset: the training data, or None for a Trainer that only evaluates.
        scores: its scores or weights, or None.
        key: the weight's name in its samples.
        carried: whether its samples carry their weight.
        resample: whether samples are drawn by the weights.
        rule: a token rule, which makes weights of its own.

    Raises:
        ValueError: nothing, or too much, says what a sample weighs.
    """
    if carried and (scores is not None or resample):
        raise ValueError(
            f"train_dataset carries weights ({key!r}) already: pass it without scores "
            "and resample, or pass the plain data set"
        )
    if resample and scores is None:
        raise ValueError("resample=True needs scores=, the scores or weights to draw by")
    if dataset is not None and not (carried or scores is not None or rule):
        raise ValueError(
            f"train_dataset has no {key!r} and scores is None, so training would be "
            "unweighted: pass scores=, or a FlowWeightedDataset, or a data set with a column "
            f"{key!r} (Scores.to_column)"
        )


def check_token_rule(
    rule: TokenRule | None, normalize: Normalize, sample_loss: SampleLoss | None
) -> None:
    """Refuse a token rule that has no denominator, or no tokens, to work with.

    Raises:
        ValueError: the rule comes with ``normalize="weights"`` or with a `sample_loss`.
    """
    if rule is not None and normalize == "weights":
        raise ValueError(
            "token_rule with normalize='weights' would divide by weights that are not known "
            "before the whole step has run; use normalize='count'"
        )
    if rule is not None and sample_loss is not None:
        raise ValueError(
            "token_rule is for causal language models, whose token losses it weighs; sample_loss "
            "gives one loss for each sample, so pass one of the two"
        )


def check_arguments(trainer: Any) -> None:
    """Refuse a Trainer's own options under which the weights would be dropped or cut wrongly.

    Raises:
        ImportError: this transformers can't be told that a loss is divided already.
        ValueError: an option replaces the loss, or splits batches after their weights are counted.
    """
    if trainer.args.label_smoothing_factor:
        raise ValueError(
            "label_smoothing_factor computes a loss of its own that ignores the weights; set "
            "it to 0, or pass sample_loss= with the smoothing in it"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func never sees the weights; pass sample_loss=(outputs, labels) -> "
            "(B,) losses instead"
        )
    if trainer.args.n_gpu > 1:
        raise ValueError(
            "nn.DataParallel splits batches after their weights are counted; launch one "
            "process for each GPU (torchrun, accelerate launch)"
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled):
        raise ValueError(
            "context and sequence parallelism cut sequences after their weights are laid "
            "along them; use data parallelism (DDP, FSDP)"
        )
    if not hasattr(trainer, "loss_is_scaled_for_ga"):
        raise ImportError("this transformers divides accumulated losses; install 5.19 or newer")
