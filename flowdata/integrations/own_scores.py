"""``scores="auto"``: a Trainer scores what it will feed itself, before it trains on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
from datasets import Dataset
from torch import Tensor

from flowdata._common.rng import preserved_rng
from flowdata.integrations.prepared import check_not_a_stream
from flowdata.models.adapters import why_no_base
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer
from flowdata.weights import Temperature

_AUTO = "auto"
_SAMPLES_COLLATED_AGAIN = 4  # to see whether they come out the same


def check_auto(scores: Any, store: Any, *, own_loss: bool) -> None:
    """Refuse a word or a folder in the place of scores, or a store that nothing goes into.

    Args:
        scores: what the Trainer was given.
        store: its folder, or None.
        own_loss: whether samples are drawn for a loss that the Trainer computes itself.

    Raises:
        ValueError: `scores` is a word other than ``"auto"``; `store` comes without ``"auto"``; or
            a scorer can't compute the Trainer's loss.
    """
    if isinstance(scores, str | Path) and scores != _AUTO:
        raise ValueError(
            f"scores must be Scores, weights or 'auto', got {str(scores)!r}; of a store pass "
            f"flowdata.Scores.load({str(scores)!r})"
        )
    is_auto = isinstance(scores, str)
    if store is not None and not is_auto:
        raise ValueError(
            "store= is where scores='auto' keeps its losses; pass scores='auto' with it, or "
            "scores=flowdata.Scores.load(store) alone"
        )
    if is_auto and own_loss:
        raise ValueError(
            "scores='auto' scores by the model's own loss, and this Trainer computes another one; "
            "score with flowdata.LossScorer(model, loss=...), and pass scores="
        )


def score_batches(trainer: Any, dataset: Any, collator: Any, store: str | Path | None) -> Scores:
    """Return the scores of a Trainer's data set, as its collator hands it to its model.

    All ranks of the process group share the work. Columns that the Trainer removes play no part,
    neither in the losses nor in the store's identity.

    Args:
        trainer: a Trainer on the weights, made but not trained; its `loss` is what is scored.
        dataset: what it reads, map-style.
        collator: list of samples -> batch.
        store: the folder or URL that keeps the losses, or None.

    Raises:
        ValueError: the collator draws at random.
        ScoreMismatchError: the store is of another model, data set, collator or loss.
    """
    collate = _CopyingCollator(collator)
    _check_repeatable(collate, dataset)
    model, loss = trainer.model, trainer.loss
    scorer = LossScorer(
        model,
        partial(_losses_of_outputs, loss=loss) if callable(loss) else loss,
        batch_size=None if _keeps_rows(collate, dataset) else 1,
        reference="model" if why_no_base(model) else "base",
        progress=not trainer.args.disable_tqdm,
    )
    return scorer.score(dataset, collate_fn=collate, store=store)


def feed_of(trainer: Any) -> tuple[Any, Any]:
    """Return the data set that a Trainer reads and the collator that it uses.

    Args:
        trainer: a Trainer, with what it prepared as `train_dataset`.

    Raises:
        ValueError: the training data is a stream.
    """
    check_not_a_stream(trainer.train_dataset, "scores='auto'")
    dataset, collator = trainer.train_dataset, trainer.data_collator
    # As the Trainer's own loader does it: off the table where there is one, else off each sample.
    if isinstance(dataset, Dataset):
        return trainer._remove_unused_columns(dataset, description="training"), collator
    return dataset, trainer._get_collator_with_removed_columns(collator, description="training")


def weights_of_targets(scores: Scores, temperature: Temperature) -> Tensor:
    """Return the weights of scores, 0 for samples without any target: (N,) float32.

    Such a sample, as truncation leaves it, takes no part in the loss anyway.

    Args:
        scores: N samples.
        temperature: as in `resolve_temperature`.

    Raises:
        ValueError: a sample has targets and no finite loss.

    Example:
        >>> losses, counts = torch.tensor([1.0, torch.nan]), torch.tensor([3, 0])
        >>> weights_of_targets(Scores(losses, counts), 1.0)
        tensor([0.3679, 0.0000])
    """
    lacks_targets_alone = bool((scores.counts[scores.losses.isnan()] == 0).all())
    return scores.weights(temperature, missing="zero" if lacks_targets_alone else "raise")


class _CopyingCollator:
    """A Trainer's collator on copies of the samples: some collators take fields out of theirs.

    A scorer makes such copies, too. This class stays, since stores are recognised by its name.
    """

    def __init__(self, collator: Callable[[list[Any]], Any]) -> None:
        self.collator = collator

    def __call__(self, samples: list[Any]) -> Any:
        return self.collator([dict(s) if isinstance(s, Mapping) else s for s in samples])


def _check_repeatable(collate: Callable[[list[Any]], Any], dataset: Any) -> None:
    """Refuse a collator that masks or augments at random: a loss would be that of one draw."""
    samples = [dataset[index] for index in range(min(_SAMPLES_COLLATED_AGAIN, len(dataset)))]
    batches = []
    for seed in (1, 2):
        with preserved_rng(seed=seed):
            batches.append(collate(samples))
    if not _are_equal(*batches):
        raise ValueError(
            "the collator gives other batches of the same samples each time, as random masking "
            "does, so that a loss would be that of one draw; score with a collator that doesn't, "
            "or take the mean over draws (flowdata.views.score_views), and pass scores="
        )


def _are_equal(first: Any, second: Any) -> bool:
    if isinstance(first, Mapping):
        return all(_are_equal(first[name], second[name]) for name in first)
    if isinstance(first, list | tuple):
        return all(map(_are_equal, first, second)) and len(first) == len(second)
    if isinstance(first, Tensor):
        return first.shape == second.shape and bool(torch.equal(first, second))
    return True


def _keeps_rows(collate: Callable[[list[Any]], Any], dataset: Any) -> bool:
    """Whether a batch has a row for each sample: a joined row can't be told apart again."""
    if len(dataset) < 2:
        return True
    batch = collate([dataset[0], dataset[1]])
    ids = batch.get("input_ids") if isinstance(batch, Mapping) else None
    return not isinstance(ids, Tensor) or len(ids) == 2


def _losses_of_outputs(model: Any, batch: Any, *, loss: Any) -> Tensor:
    losses: Tensor = loss(model(**batch), batch)
    return losses
