"""The recipe for a task with a head of its own, step by step, around any training loop.

    probe       a new head is fitted on the frozen body
    score       the losses of body and new head are what weights are made from
    fine-tune   body and new head, by the caller's loop
    head again  the new head alone is fitted once more, without weights
    old task    the fine-tuned body gets its old head and its old BatchNorm back

Source: Sanyal et al., ICML 2025, arXiv:2502.02797, section 5.
"""

from __future__ import annotations

import copy
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, cast

from torch import nn

from flowdata.companions.batch_norm import batch_norm_state
from flowdata.probe.linear_probe import linear_probe
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer


@dataclass(frozen=True)
class HeadRecipe:
    """The steps of the recipe for one pre-trained body; all but `old_model` leave it untouched.

    Attributes:
        body: maps inputs to features, (B, D).
        old_head: maps features to the logits of the task that the body was pre-trained on.
        strength: of the probe's ℓ2 penalty, see `flowdata.linear_probe`.
        dtype: of the body's pass for the probe.
        workers: processes that load samples.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> points = torch.tensor([[-2.0], [-1.0], [1.0], [2.0]])
        >>> data = TensorDataset(points, torch.tensor([0, 0, 1, 1]))
        >>> recipe = HeadRecipe(torch.nn.Linear(1, 3), torch.nn.Linear(3, 5), dtype="float32")
        >>> model = recipe.probe(torch.nn.Linear(3, 2), data)
        >>> weights = recipe.score(model, data).weights()
        >>> tuned = recipe.fine_tune(model, data, lambda model: None)  # your loop's place
        >>> tuned(points).argmax(1).tolist()
        [0, 0, 1, 1]
        >>> recipe.old_model(tuned)(points).shape
        torch.Size([4, 5])
    """

    body: nn.Module
    old_head: nn.Module
    strength: float = 1e-3
    dtype: str = "auto"
    workers: int = 0

    def probe(self, head: nn.Linear, data: Any) -> nn.Sequential:
        """Return the body with a new head, whose values are replaced by those fitted to `data`."""
        model = nn.Sequential(self.body, head)
        self._fit_head(model, data)
        return model

    def score(
        self, model: nn.Sequential, data: Any, *, dtype: str = "auto", columns: Sequence[str] = ()
    ) -> Scores:
        """Return the losses of the probed model; `dtype` and `columns` are `LossScorer`'s."""
        scorer = LossScorer(model, "cross_entropy", dtype=dtype, columns=columns, progress=False)
        return scorer.score(data, num_workers=self.workers)

    def fine_tune(
        self,
        model: nn.Sequential,
        data: Any,
        train: Callable[[nn.Sequential], None],
        *,
        head_again: bool = True,
    ) -> nn.Sequential:
        """Return a copy of the probed model after `train` has changed it.

        Args:
            model: what `probe` returned.
            data: what the head is fitted to once more.
            train: changes a model in place.
            head_again: False leaves the head as training left it. Where training has diverged
                there is nothing to fit a head to, and it is left as well.
        """
        tuned = copy.deepcopy(model)
        train(tuned)
        if head_again and _is_finite(tuned):
            self._fit_head(tuned, data)
        return tuned

    def old_model(self, tuned: nn.Sequential) -> nn.Sequential:
        """Return the fine-tuned body with the old head, ready to be measured on the old task.

        The body isn't copied: its BatchNorm parameters and statistics are put back in place, so
        measure the new task before.
        """
        tuned[0].load_state_dict(batch_norm_state(self.body), strict=False)
        return nn.Sequential(tuned[0], self.old_head)

    def _fit_head(self, model: nn.Sequential, data: Any) -> None:
        linear_probe(
            model[0],
            cast(nn.Linear, model[1]),  # `linear_probe` refuses all else
            data,
            strength=self.strength,
            dtype=self.dtype,
            num_workers=self.workers,
            progress=False,
        )


def _is_finite(model: nn.Module) -> bool:
    return all(tensor.isfinite().all() for tensor in model.state_dict().values())
