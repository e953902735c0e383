"""Comparing the scores of a tuned model with those of the frozen one, sample by sample."""

from __future__ import annotations

import functools
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from flowdata.errors import ScoreMismatchError
from flowdata.report.comparison import render_comparison
from flowdata.report.samples import SampleText
from flowdata.scores import Scores
from flowdata.scores.matching import stores_difference
from flowdata.store.identity import field_difference

_SHARED = ("dataset", "num_samples", "loss", "collate_fn")  # of both identities


@dataclass(frozen=True)
class Comparison:
    """What became of each sample's loss.

    Attributes:
        before: of the frozen model, N samples.
        after: of the tuned model.
    """

    before: Scores
    after: Scores

    @functools.cached_property
    def differences(self) -> Tensor:
        """Loss after less loss before, (N,) float32, in nats for language models.

        Below 0 is what was learned, above 0 what was forgotten; NaN is where one of both lacks.
        """
        return self.after.losses - self.before.losses

    def learned(self, most: int = 10) -> list[int]:
        """Return the samples whose losses fell most, the first the most; none that rose.

        Args:
            most: how many at most.
        """
        return [index for index in self._in_order(most) if self.differences[index] < 0]

    def forgotten(self, most: int = 10) -> list[int]:
        """Return the samples whose losses rose most, the first the most; none that fell.

        Args:
            most: how many at most.
        """
        order = self._in_order(most, descending=True)
        return [index for index in order if self.differences[index] > 0]

    def summary(self) -> dict[str, Any]:
        """Return figures about all samples that have both losses, JSON-like."""
        present = self.differences[~self.differences.isnan()].double()
        return {
            "samples": len(self.differences),
            "compared": len(present),
            "learned": int((present < 0).sum()),
            "forgotten": int((present > 0).sum()),
            "mean_difference": present.mean().item() if len(present) else None,
            "largest_fall": present.min().item() if len(present) else None,
            "largest_rise": present.max().item() if len(present) else None,
        }

    def write(
        self,
        folder: str | Path,
        *,
        samples: Callable[[int], SampleText] | None = None,
        images: Callable[[int], Any] | None = None,
        top: int = 10,
    ) -> Path:
        """Write `comparison.html` into a folder, a page that stands alone; return its path.

        It shows the figures, how the changes are distributed, the samples that moved most, and a
        table of all samples with both losses.

        Args:
            folder: made if missing.
            samples: gives the text of sample i, as `write_report` takes it; None shows numbers
                alone.
            images: gives the image of sample i, as `write_report` takes it; asked for the samples
                that moved most.
            top: how many of the samples learned most and of those forgotten most it lists.

        Raises:
            ImportError: matplotlib is not installed.
            TypeError: `images` gives something else.
            ValueError: no sample has both losses, or `top` is negative.
        """
        if top < 0:
            raise ValueError(f"top must be >= 0, got {top}")
        summary = self.summary()
        if not summary["compared"]:
            raise ValueError(
                f"none of the {summary['samples']} samples has a loss both before and after: there "
                "is nothing to compare"
            )
        learned, forgotten = self.learned(top), self.forgotten(top)
        html = render_comparison(
            self.before, self.after, summary, learned, forgotten, samples, images
        )
        path = Path(folder) / "comparison.html"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(html, encoding="utf-8")
        return path

    def _in_order(self, most: int, *, descending: bool = False) -> list[int]:
        last = -torch.inf if descending else torch.inf
        values = self.differences.nan_to_num(last, torch.inf, -torch.inf)
        order: list[int] = values.argsort(descending=descending, stable=True)[:most].tolist()
        return order


def compare(before: Scores, after: Scores) -> Comparison:
    """Return what became of each sample's loss.

    Scored on the new task's samples, it tells which of them were learned; on others, such as text
    that the frozen model wrote (`own_text`), which were forgotten.

    Args:
        before: of the frozen model.
        after: of the tuned model, on the same samples.

    Raises:
        TypeError: one of both is no `Scores`.
        ScoreMismatchError: they are of other samples, or of another loss.

    Example:
        >>> counts = torch.ones(3, dtype=torch.long)
        >>> before = Scores(torch.tensor([2.0, 1.0, 0.5]), counts)
        >>> after = Scores(torch.tensor([0.5, 1.0, 0.75]), counts)
        >>> comparison = compare(before, after)
        >>> comparison.learned(), comparison.forgotten()
        ([0], [2])
    """
    for name, scores in (("before", before), ("after", after)):
        if not isinstance(scores, Scores):
            raise TypeError(f"{name} must be Scores, got {type(scores).__name__}")
    if len(before) != len(after):
        raise ScoreMismatchError(
            f"before has {len(before)} samples and after {len(after)}; score the same data set by "
            "both models"
        )
    old, new = (scores.metadata.get("identity", {}) for scores in (before, after))
    different = [name for name in _SHARED if name in old and name in new and old[name] != new[name]]
    if different:
        of_rows = "dataset" in different and stores_difference(before.metadata, after.metadata)
        details = of_rows or field_difference(old, new, different[0], "before", "after")
        raise ScoreMismatchError(
            f"the scores differ in {', '.join(different)}: {details}; score the same data set by "
            "both models, with the same loss"
        )
    is_other = (before.counts != after.counts) & ~(before.losses + after.losses).isnan()
    if is_other.any():
        index = int(is_other.nonzero()[0])
        raise ScoreMismatchError(
            f"sample {index} has {int(before.counts[index])} targets before and "
            f"{int(after.counts[index])} after, so that the two are not of the same samples in the "
            "same order; score the same data set by both models"
        )
    return Comparison(before, after)
