"""The losses of one window after another, from a scorer that is left as it is."""

from __future__ import annotations

import copy
import inspect
from collections.abc import Callable
from typing import Any

from torch import Tensor
from torch.utils.data import get_worker_info

from flowdata._common.notices import Once, say
from flowdata.scoring.scorer import LossScorer, Scorer


class WindowScorer:
    """Scores windows of a stream, and says once what it would say for each of them.

    Args:
        scorer: a `LossScorer`, or anything with its `score`.
        collate_fn: as `score` takes it.
    """

    def __init__(self, scorer: Scorer, collate_fn: Callable[[list[Any]], Any] | None) -> None:
        if not hasattr(scorer, "score"):
            raise TypeError(f"scorer must be a LossScorer, got {type(scorer).__name__}")
        self.scorer, self.collate_fn = scorer, collate_fn
        self._window_scorer = _for_windows(scorer)
        self._options = _options_of_one_rank(scorer)
        self._once = Once()
        self._has_said = False  # how windows are scored

    def losses(self, window: list[Any]) -> Tensor:
        """Return the (W,) losses of a window; those that are absent are not finite.

        Raises:
            ValueError: the scorer gives another number of them.
        """
        with self._once:
            scores = self._window_scorer.score(
                window, collate_fn=self.collate_fn, dataset_id="window", **self._options
            )
        self._say_what_was_chosen()
        losses = scores.losses.detach().cpu()
        if len(losses) != len(window):
            raise ValueError(
                f"the scorer gave {len(losses)} losses for a window of {len(window)} samples"
            )
        return losses

    def _say_what_was_chosen(self) -> None:
        worker = get_worker_info()
        is_first = worker is None or worker.id == 0
        if isinstance(self._window_scorer, LossScorer) and is_first and not self._has_said:
            shown = getattr(self.scorer, "progress", False)
            say(f"windows of a stream: {self._window_scorer.explain()}", shown=shown)
        self._has_said = True


def _for_windows(scorer: Scorer) -> Scorer:
    """The scorer as it scores windows: no progress bar, no fingerprint of the model for each."""
    if not isinstance(scorer, LossScorer):
        return scorer
    scorer = copy.copy(scorer)
    scorer.progress = False
    scorer.is_for_windows = True
    return scorer


def _options_of_one_rank(scorer: Scorer) -> dict[str, Any]:
    """The options of `score` that let a scorer work on this rank without the others.

    Inside a process group a `LossScorer` shares its work among the ranks, all of which have to call
    it with the same samples. Here every rank scores different windows at its own pace, so sharing
    is turned off. A scorer whose `score` has no argument `shared` does not share.
    """
    parameters = inspect.signature(scorer.score).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"shared": False} if "shared" in parameters or takes_any else {}
