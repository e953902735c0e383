"""What a Trainer on the weights refuses: options, and loaders, that can't be right together."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from flowdata._common.data_sets import is_map_style
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable, Unreadable
from flowdata.dataset import FlowWeightedDataset
from flowdata.integrations.checks import (
    check_loader,
    draws_by_weight,
    flow_sampler_of,
    stream_of,
)
from flowdata.integrations.prepared import check_weight_column
from flowdata.integrations.trainer_loss import SampleLoss
from flowdata.losses import Normalize
from flowdata.models.adapters import check_base
from flowdata.sampler import FlowSampler
from flowdata.scores.counting import targets_of
from flowdata.streaming import FlowWeightedIterable
from flowdata.targets.arguments import check_kl
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.targets.target_weights import check_normalize
from flowdata.targets.which_loss import LOSSES, first_argument
from flowdata.token_weights import TokenRule


def check_anchor(kl_to_reference: Any, reference: Any) -> float:
    """Return the strength of a divergence to the base model, 0 where there is none.

    Raises:
        ValueError: one of the two comes without the other, the strength is no number ≥ 0, or the
            reference is none that a Trainer has.
    """
    needs = "which is 'base' here: a PEFT model with its adapters off"
    strength = check_kl(kl_to_reference, reference, needs)
    if reference not in (None, "base"):
        raise ValueError(
            f"reference must be 'base', a PEFT model with its adapters off, got {reference!r}; a "
            "loop of your own can pass another model's logits to flowdata.causal_lm_loss"
        )
    return strength


def changes_token_losses(rule: TokenRule | None, strength: float) -> str | None:
    """Return the option that gives tokens another loss than their weighted one, None without."""
    if rule is not None:
        return "token_rule"
    return "kl_to_reference" if strength else None


def check_data(
    dataset: Any, scores: Any, key: str, *, carried: bool, resample: bool, changes: str | None
) -> None:
    """Refuse training data with two weights for a sample, or with none.

    Args:
        dataset: the training data, or None for a Trainer that only evaluates.
        scores: its scores or weights, or None.
        key: the weight's name in its samples.
        carried: whether its samples carry their weight.
        resample: whether samples are drawn by the weights.
        changes: the option that changes the losses of tokens, which needs no weights beside it.

    Raises:
        TypeError: `scores` is True or False.
        ValueError: nothing, or too much, says what a sample weighs; there are scores of no data; a
            row has no usable weight; or samples carry reference outputs.
    """
    if isinstance(dataset, FlowWeightedDataset) and dataset.reference is not None:
        raise ValueError(
            "a Trainer's loss takes no reference outputs, so that they would be ignored; leave "
            "reference= out, and hold the model by add_anchor(trainer, OutputAnchor)"
        )
    if isinstance(scores, bool):
        raise TypeError(f"scores must be Scores, weights or 'auto', got {scores}")
    if dataset is None and scores is not None:
        raise ValueError(
            "scores are those of train_dataset, which is None; pass it, or leave scores out of a "
            "Trainer that only evaluates"
        )
    if draws_by_weight(dataset) and (scores is not None or resample):
        raise ValueError(
            "train_dataset is a stream that draws by its own weights: pass it without scores and "
            "resample"
        )
    if carried and (scores is not None or resample):
        raise ValueError(
            f"train_dataset carries weights ({key!r}) already: pass it without scores "
            "and resample, or pass the plain data set"
        )
    if resample and scores is None:
        raise ValueError("resample=True needs scores=, the scores or weights to draw by")
    is_weighted = carried or scores is not None or changes or draws_by_weight(dataset)
    if dataset is not None and not is_weighted:
        raise ValueError(
            f"train_dataset has no {key!r} and scores is None, so training would be "
            "unweighted: pass scores='auto', or the data set's scores, or a FlowWeightedDataset, "
            f"or a data set with a column {key!r} (Scores.to_column)"
        )
    check_weight_column(dataset, key)


def check_run_loss(
    loss: str | SampleLoss,
    rule: TokenRule | None,
    normalize: Normalize,
    *,
    resample: bool,
    changes: str | None,
) -> None:
    """Refuse a loss that is none, one that would be ignored, or a token rule without tokens.

    Raises:
        ValueError: an unknown loss or `normalize`; either of the two under resampling, which leaves
            the loss alone; a rule with ``normalize="weights"``; or an option of token losses with a
            loss that has none.
    """
    check_normalize(normalize)
    if not callable(loss) and loss not in ("auto", *LOSSES):
        raise ValueError(
            f"loss must be 'auto', one of {', '.join(map(repr, LOSSES))}, or a callable "
            f"(outputs, batch) -> (B,) losses; got {loss!r}"
        )
    if callable(loss) and first_argument(loss) == "model":
        raise ValueError(
            "a Trainer calls the model itself, so loss= takes (outputs, batch) -> (B,) losses, not "
            "(model, batch); LossScorer takes both"
        )
    if resample and loss != "auto":
        raise ValueError(
            "resample=True leaves the loss to the Trainer, so loss= would be ignored; pass it to "
            "the Trainer's own compute_loss_func, or weigh with resample=False"
        )
    if resample and normalize != "count":
        raise ValueError(
            f"resample=True leaves the loss to the Trainer, so normalize={normalize!r} would be "
            "ignored; leave it out, or weigh with resample=False"
        )
    if rule is not None and normalize == "weights":
        raise ValueError(
            "token_rule with normalize='weights' would divide by weights that are not known "
            "before the whole step has run; use normalize='count'"
        )
    if changes is not None and loss not in ("auto", "causal_lm"):
        raise ValueError(
            f"{changes} is for causal language models, whose token losses it changes; "
            f"leave loss='auto', or leave {changes} out"
        )


def check_resampling(args: Any) -> None:
    """Refuse an order of samples that `resample` would ignore.

    Raises:
        ValueError: the Trainer's arguments ask for one.
    """
    strategy = getattr(args, "train_sampling_strategy", "random")
    if getattr(args, "group_by_length", False):  # the option's name before transformers 5
        strategy = "group_by_length"
    if strategy != "random":
        raise ValueError(
            f"resample=True draws samples by their weights, so {strategy!r} would be ignored; "
            "leave train_sampling_strategy at 'random', or weigh with resample=False"
        )


def check_train_loader(loader: Any, sampler: FlowSampler | None, *, weighted_loss: bool) -> None:
    """Refuse the loader of a run that would train on other samples than the weights say.

    Args:
        loader: what the Trainer is about to iterate, as Accelerate prepared it.
        sampler: that which was made for the run, or None.
        weighted_loss: whether the loss is weighted.

    Raises:
        ValueError: another sampler draws; weights would act twice; or a sampler or a stream would
            be sharded twice.
    """
    check_loader(loader, weighted_loss=weighted_loss)
    used = flow_sampler_of(loader)
    _check_stream(stream_of(loader))
    if used is not None and used.num_replicas > 1:
        raise ValueError(
            "the Trainer shards a sampler's order over the ranks itself, so a rank-aware "
            "FlowSampler would be sharded twice; make it with num_replicas=1, rank=0"
        )
    if sampler is not None and used is not sampler:
        raise ValueError(
            "resample=True made a FlowSampler, and the training loader doesn't use it: "
            "get_train_dataloader or _get_train_sampler is overridden by a class that doesn't ask "
            "super(). Put FlowTrainerMixin first, or take the sampler from "
            "super()._get_train_sampler()"
        )


def check_drawn_data(weighed: Any, dataset: Any, loader: Any) -> None:
    """Refuse to draw, by the weights of one data set, from another.

    Args:
        weighed: the training data when the sampler was made.
        dataset: the training data now.
        loader: what the Trainer is about to iterate.

    Raises:
        ValueError: the data was replaced, or the loader reads from data of another length.
    """
    loaded = getattr(loader, "dataset", weighed)
    if dataset is not weighed or (hasattr(loaded, "__len__") and len(loaded) != len(weighed)):
        raise ValueError(
            f"resample=True draws by the weights of the train_dataset of {len(weighed)} samples "
            "that the Trainer was made with, and training would draw from another; make a new "
            "Trainer with the new data set and its scores"
        )


def _check_stream(stream: FlowWeightedIterable | None) -> None:
    """Refuse a stream that deals its samples out to ranks under a Trainer, which does so itself.

    Raises:
        ValueError: the stream has several ranks.
    """
    if stream is not None and stream.num_replicas > 1:
        raise ValueError(
            "the Trainer deals a stream's samples out to the ranks itself, so a "
            f"FlowWeightedIterable of {stream.num_replicas} ranks would lose all but 1 in "
            f"{stream.num_replicas}; make it "
            "with num_replicas=1, rank=0"
        )


def check_arguments(trainer: Any) -> None:
    """Refuse a Trainer's own options under which the weights would be dropped or cut wrongly.

    Raises:
        ImportError: this transformers can't be told that a loss is divided already.
        ValueError: an option replaces the loss, or splits batches after their weights are counted.
    """
    if trainer.args.label_smoothing_factor or trainer.label_smoother is not None:
        raise ValueError(
            "label_smoothing_factor computes a loss of its own that ignores the weights; set "
            "it to 0, or pass loss=(outputs, batch) -> (B,) with the smoothing in it"
        )
    if trainer.compute_loss_func is not None:
        raise ValueError(
            "compute_loss_func never sees the weights; pass loss=(outputs, batch) -> (B,) losses "
            "instead"
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
    if trainer.kl_to_reference:
        check_base(trainer.model)
    if not hasattr(trainer, "loss_is_scaled_for_ga"):
        raise ImportError("this transformers divides accumulated losses; install 5.19 or newer")


def check_rows(trainer: Any) -> None:
    """Refuse training rows that hold nothing for the model, or of which none has a target.

    Args:
        trainer: a Trainer, with what it prepared as `train_dataset`.

    Raises:
        ValueError: the Trainer would leave none of their columns, as of text; or no label of any
            row counts.
    """
    dataset = trainer.train_dataset
    if dataset is None or not is_map_style(dataset) or len(dataset) == 0:
        return
    with preserved_rng(seed=0):
        if trainer.args.remove_unused_columns and not _makes_own_loader(trainer):
            _check_columns(trainer, dataset[0])
        if _lacks_targets(dataset):
            raise ValueError(
                f"none of the {len(dataset):,} rows of train_dataset has a target: their labels "
                f"are {IGNORE_INDEX} throughout, so nothing would be learned. Rows that are cut "
                "too short lose their targets: take a greater max_length, or truncation='keep_end'"
            )


def _makes_own_loader(trainer: Any) -> bool:
    """Whether a class of the user's makes the training loader, and may tokenise in it."""
    maker = type(trainer).get_train_dataloader.__module__.partition(".")[0]
    return maker not in ("transformers", "trl", "flowdata")


def _check_columns(trainer: Any, sample: Any) -> None:
    if not isinstance(sample, Mapping):
        return
    trainer._set_signature_columns_if_needed()
    names = [name for name in sample if name != trainer.weight_key]
    if names and not set(names) & set(trainer._signature_columns):
        raise ValueError(
            f"train_dataset has the columns {', '.join(map(str, names))}, and none that the model "
            "takes: tokenise text first (flowdata.text.tokenize_rows), or train with TRL, whose "
            "trainers take text (flowdata.integrations.trl.FlowSFTTrainer)"
        )


def _lacks_targets(dataset: Any) -> bool:
    """Whether every row says that it has no target; the first that says otherwise ends the look."""
    readable = Readable(dataset, skip=True)
    for index in range(len(dataset)):
        sample = readable[index]
        rows = sample if isinstance(sample, tuple | list) else [sample]
        if isinstance(sample, Unreadable):
            continue
        if targets_of(rows[0] if rows else None, is_shifted=False) != 0:
            return False
    return True


def lost_weight(key: str) -> ValueError:
    """Return the error of a training batch in which the weights are missing.

    Args:
        key: the weight's name in samples and batches.
    """
    return ValueError(
        f"a training batch has no {key!r}: the data set or the collator dropped it; keep the "
        "column in the data set's format and don't replace trainer.data_collator after construction"
    )
