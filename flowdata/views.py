"""Losses under random augmentation: the mean over several views of every sample."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

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

    Every draw depends on (seed, view, index) alone: the losses are the same again for any number
    of workers, and sample i's first two views for ``views=2`` and ``views=8``.

    Args:
        scorer: a `LossScorer`.
        dataset: map-style; its ``__getitem__`` draws from Python's, NumPy's or torch's global
            generators.
        views: how many draws of each sample, ≥ 1.
        seed: of the draws.
        store: a folder that keeps the losses of view k in ``view-k``; see `LossScorer.score`.
        options: for `LossScorer.score`.

    Returns:
        Scores of `dataset`, with the columns averaged as well. A sample that has no loss in one
        view has none. Token losses are not kept: views may differ in their targets.

    Raises:
        ValueError: `views` is below 1.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> from flowdata import LossScorer
        >>> data = TensorDataset(torch.ones(4, 2), torch.tensor([0, 1, 0, 1]))
        >>> scorer = LossScorer(torch.nn.Linear(2, 2), progress=False)
        >>> score_views(scorer, data, views=3)
        Scores(4 samples, 0 without a loss)
    """
    if not isinstance(views, int) or views < 1:
        raise ValueError(f"views must be an integer >= 1, got {views!r}")
    named = options.pop("dataset_id", None)
    parts = [
        scorer.score(
            _View(dataset, seed, view),
            store=None if store is None else Path(store) / f"view-{view}",
            dataset_id=None if named is None else f"{named}, view {view} of seed {seed}",
            **options,
        )
        for view in range(views)
    ]
    identity = dict(parts[0].metadata["identity"])
    identity["dataset"] = named or content_identity(dataset)
    identity |= {"views": views, "seed": seed}
    return Scores(
        _mean(parts, lambda part: part.losses),
        parts[0].counts,
        metadata={**parts[0].metadata, "identity": identity},
        columns={
            name: _mean(parts, lambda part, name=name: part.columns[name])  # type: ignore[misc]
            for name in parts[0].columns
        },
    )


class _View:
    """A data set whose random draws are those of one view."""

    def __init__(self, dataset: Any, seed: int, view: int) -> None:
        self.dataset, self.seed, self.view = dataset, seed, view

    def __len__(self) -> int:
        return len(self.dataset)

    def __getitem__(self, index: int) -> Any:
        name = f"{self.seed} {self.view} {index}".encode()
        with preserved_rng(int.from_bytes(hashlib.sha256(name).digest()[:4], "little")):
            return self.dataset[index]


def _mean(parts: list[Scores], values: Callable[[Scores], Tensor]) -> Tensor:
    return torch.stack([values(part).double() for part in parts]).mean(0).float()
