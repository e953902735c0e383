"""Losses under random augmentation: the mean over several views of every sample."""

from __future__ import annotations

import hashlib
import inspect
import operator
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata._common.data_sets import check_map_style
from flowdata._common.resumable import check_natural
from flowdata._common.rng import preserved_rng
from flowdata.scores import Scores
from flowdata.scoring.scorer import Scorer
from flowdata.store.identity import content_identity
from flowdata.store.places import place_of


def score_views(
    scorer: Scorer,
    dataset: Any,
    *,
    views: int,
    seed: int = 0,
    store: str | Path | None = None,
    **options: Any,
) -> Scores:
    """Return each sample's loss, averaged over `views` draws of the data set's random transform.

    The plain way is to score with the evaluation transform, which costs one pass: do that unless
    the training transform changes the samples so much that their order of difficulty changes.

    Every draw depends on (seed, view, index) alone. The losses are therefore the same for any
    number of workers, and the first two views of a sample are the same whether there are two or
    eight.

    Args:
        scorer: a `LossScorer`.
        dataset: map-style; its ``__getitem__`` draws from Python's, NumPy's or torch's global
            generators.
        views: how many draws of each sample, >= 1.
        seed: of the draws.
        store: a folder or URL that keeps the losses of view k in ``view-k``; see
            `LossScorer.score`. Interrupted work goes on where it stopped.
        options: for `LossScorer.score`. With ``on_error="skip"`` a sample that one of its views
            can't be read from has no loss, and its reason stands in the metadata, `skipped`.

    Returns:
        Scores of `dataset`, with the columns averaged as well. A sample without a loss in one of
        its views has no loss at all. The counts are those of the first view.

    Raises:
        TypeError: `dataset` is not map-style, `scorer` scores nothing, or `score` takes no such
            option.
        ValueError: `views` is no integer or below 1, `seed` is none or negative, or the scorer
            was made with ``token_losses=True``: the targets of a sample may differ from view to
            view, so that there is nothing to average. All errors, those of the data set's content
            included, come before anything is scored.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from flowdata import LossScorer
        >>> data = TensorDataset(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> scorer = LossScorer(torch.nn.Linear(2, 2), progress=False)
        >>> score_views(scorer, data, views=3)
        Scores(4 samples, 0 without a loss)
    """
    _check_arguments(scorer, dataset, options)
    check_natural("views", views, least=1)
    check_natural("seed", seed)
    name = options.pop("dataset_id", None)
    # Before anything is scored: samples without content are refused here.
    skip = options.get("on_error") == "skip"
    content = name
    if name is None:
        content = content_identity(dataset, skip_unreadable=skip)
    scores_of_views = [
        scorer.score(
            _View(dataset, seed, view),
            store=None if store is None else place_of(store) / f"view-{view}",
            # A name stands for content: each view's draws are content of their own.
            dataset_id=None if name is None else f"{name}, view {view} of seed {seed}",
            **options,
        )
        for view in range(views)
    ]
    first = scores_of_views[0]
    identity = {**first.metadata["identity"], "dataset": content, "views": views, "seed": seed}
    skipped = {
        index: reason
        for scores in reversed(scores_of_views)
        for index, reason in scores.metadata.get("skipped", {}).items()
    }
    return Scores(
        _mean([scores.losses for scores in scores_of_views]),
        first.counts,
        metadata={**first.metadata, "identity": identity, "skipped": skipped},
        columns={
            column: _mean([scores.columns[column] for scores in scores_of_views])
            for column in first.columns
        },
    )


def _check_arguments(scorer: Any, dataset: Any, options: dict[str, Any]) -> None:
    """Refuse, before any work, what could not be scored or would be ignored."""
    if not hasattr(scorer, "score"):
        raise TypeError(f"scorer must be a LossScorer, got {type(scorer).__name__}")
    check_map_style(dataset)
    try:
        inspect.signature(scorer.score).bind(dataset, store=None, **options)
    except TypeError as error:
        raise TypeError(f"score_views passes its options on to score, but: {error}") from None
    if getattr(scorer, "token_losses", False):
        raise ValueError(
            "score_views returns no token losses, since the targets of a sample may differ from "
            "view to view; build the scorer with token_losses=False"
        )


class _View:
    """A data set whose samples draw at random as one view says, whoever asks for them and when."""

    def __init__(self, dataset: Any, seed: int, view: int) -> None:
        self.dataset, self.seed, self.view = dataset, seed, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        index = operator.index(index)  # 3 of NumPy and torch draws what 3 draws
        # Nearby seeds of a generator may begin alike; hashes of nearby names don't. NumPy's global
        # generator takes 32 bits.
        digest = hashlib.sha256(f"{self.seed} {self.view} {index}".encode()).digest()
        with preserved_rng(int.from_bytes(digest[:4], "little")):
            return self.dataset[index]


def _mean(views: list[Tensor]) -> Tensor:
    """The mean over views of (N,) values; NaN where one of them is NaN."""
    return torch.stack(views).double().mean(0).float()
