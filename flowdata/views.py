"""Losses under random augmentation: the mean over several views of every sample."""

from __future__ import annotations

import hashlib
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata._common.resumable import check_natural
from flowdata._common.rng import preserved_rng
from flowdata.scores import Scorer, Scores
from flowdata.store.identity import content_identity


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
        store: a folder that keeps the losses of view k in ``view-k``; see `LossScorer.score`.
        options: for `LossScorer.score`.

    Returns:
        Scores of `dataset`, with the columns averaged as well. A sample without a loss in one of
        its views has no loss at all. There are no token losses, since the targets of a sample
        may differ from view to view.

    Raises:
        ValueError: `views` is no integer, or below 1.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from flowdata import LossScorer
        >>> data = TensorDataset(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> scorer = LossScorer(torch.nn.Linear(2, 2), progress=False)
        >>> score_views(scorer, data, views=3)
        Scores(4 samples, 0 without a loss)
    """
    check_natural("views", views, least=1)
    name = options.pop("dataset_id", None)
    scores_of_views = [
        scorer.score(
            _View(dataset, seed, view),
            store=None if store is None else Path(store) / f"view-{view}",
            # A name stands for content: each view's draws are content of their own.
            dataset_id=None if name is None else f"{name}, view {view} of seed {seed}",
            **options,
        )
        for view in range(views)
    ]
    first = scores_of_views[0]
    identity = {
        **first.metadata["identity"],
        "dataset": name or content_identity(dataset),
        "views": views,
        "seed": seed,
    }
    return Scores(
        _mean([scores.losses for scores in scores_of_views]),
        first.counts,
        metadata={**first.metadata, "identity": identity},
        columns={
            column: _mean([scores.columns[column] for scores in scores_of_views])
            for column in first.columns
        },
    )


class _View:
    """A data set whose samples draw at random as one view says, whoever asks for them and when."""

    def __init__(self, dataset: Any, seed: int, view: int) -> None:
        self.dataset, self.seed, self.view = dataset, seed, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        # Nearby seeds of a generator may begin alike; hashes of nearby names don't. NumPy's global
        # generator takes 32 bits.
        digest = hashlib.sha256(f"{self.seed} {self.view} {index}".encode()).digest()
        with preserved_rng(int.from_bytes(digest[:4], "little")):
            return self.dataset[index]


def _mean(views: list[Tensor]) -> Tensor:
    """The mean over views of (N,) values; NaN where one of them is NaN."""
    return torch.stack(views).double().mean(0).float()
