"""Scores: the losses of a data set under the pre-trained model, and what is made of them."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any, overload

import numpy as np
import torch
from torch import Tensor

from flowdata._common.data_sets import check_takes_column
from flowdata._common.notices import say_once
from flowdata._common.offsets import offsets_of
from flowdata.errors import ScoreMismatchError
from flowdata.report.markdown import count
from flowdata.report.pictures import plot_losses
from flowdata.report.summary import summarize, unit_of
from flowdata.scores.matching import check_match
from flowdata.scores.shapes import check_shapes, finite_float32
from flowdata.scores.table import no_such_row, part_of, row_of, to_frame, to_html
from flowdata.store.folder import read_store, write_store
from flowdata.store.format import FIELDS, STORE_TENSORS, Manifest, make_manifest
from flowdata.store.places import Place, place_of
from flowdata.targets.columns import SMALL_WHERE_EASY
from flowdata.weights import (
    Missing,
    Normalize,
    Temperature,
    plural,
    shape_weights,
    warn_of_useless_weights,
    weigh_present,
)


class Scores:
    """The loss of every sample under the frozen pre-trained model, in data set order.

    Made by `LossScorer.score` or `Scores.load`, or directly from losses computed elsewhere.

    Args:
        losses: (N,) floating, kept as float32; nats. NaN marks a sample without a loss, and
            what is infinite in float32 becomes NaN: no weight could be made of it.
        counts: (N,) integer, targets per sample; 1 each by default.
        metadata: JSON-like: how the losses were made (`identity`, `plan`, `details`, and under
            `skipped` the reasons why samples could not be read, by index).
        token_losses: (Σ counts,) floating, the targets' losses one after another, or None;
            kept as `flat_token_losses`.
        columns: further values of every sample by name, (N,) floating each (see
            `LossScorer`); kept as the losses are, in `columns`.

    Raises:
        TypeError, ValueError: wrong dtype or shape.

    Example:
        >>> import torch
        >>> scores = Scores(torch.tensor([0.1, 1.0, 3.0]))
        >>> scores.weights()
        tensor([0.9048, 0.3679, 0.0498])
    """

    def __init__(
        self,
        losses: Tensor,
        counts: Tensor | None = None,
        *,
        metadata: dict[str, Any] | None = None,
        token_losses: Tensor | None = None,
        columns: Mapping[str, Tensor] | None = None,
    ) -> None:
        losses = torch.as_tensor(losses).detach().cpu()
        if losses.dim() != 1 or len(losses) == 0 or not losses.is_floating_point():
            raise ValueError(
                "losses must be floating, of shape (N,) with N > 0, got "
                f"{losses.dtype} of shape {tuple(losses.shape)}"
            )
        ones = torch.ones(len(losses), dtype=torch.long)
        counts = ones if counts is None else torch.as_tensor(counts).cpu()
        check_shapes(losses, counts, token_losses, columns or {})
        self.losses = finite_float32(losses)
        # So that they are recognised where weights belong: a tensor of losses looks like one.
        self.losses.are_losses = True  # type: ignore[attr-defined]
        self.counts = counts.long()
        self.metadata = dict(metadata or {})
        self.flat_token_losses = (
            None if token_losses is None else token_losses.detach().cpu().float()
        )
        self.columns = {name: finite_float32(values) for name, values in (columns or {}).items()}
        self._offsets: Tensor | None = None  # into the token losses; made when first needed

    def __len__(self) -> int:
        return len(self.losses)

    def __repr__(self) -> str:
        num_missing = int(self.losses.isnan().sum())
        return f"Scores({count(len(self), 'sample')}, {num_missing:,} without a loss)"

    def _repr_html_(self) -> str:
        """Return what a notebook shows: the first and the last samples as a table."""
        return to_html(self)

    @overload
    def __getitem__(self, index: int) -> dict[str, Any]: ...

    @overload
    def __getitem__(self, index: Any) -> Any: ...

    def __getitem__(self, index: Any) -> Any:
        """Return one sample's values by name, or the scores of several samples.

        Weights of a part have a temperature of their own; for those of all samples take a part of
        `weights()`. What a part is of can't be recognised: its length and numbers of targets are
        checked alone.

        Args:
            index: an integer for one sample; a slice, a list of integers or (N,) booleans for
                `Scores` of some, in that order. Arrays and columns of pandas do, too.

        Raises:
            TypeError: it is none of these.
            IndexError: there is no such sample, or there are not N booleans.
            ValueError: it selects no sample.

        Example:
            >>> scores = Scores(torch.tensor([0.5, 1.0, 3.0]), torch.tensor([4, 2, 7]))
            >>> scores[-1]
            {'index': 2, 'loss': 3.0, 'count': 7}
            >>> scores[:2], scores[scores.losses > 0.75].counts
            (Scores(2 samples, 0 without a loss), tensor([2, 7]))
        """
        is_one = isinstance(index, int | np.integer) or getattr(index, "ndim", None) == 0
        if is_one and not isinstance(index, bool):
            return row_of(self, index)
        return part_of(self, index)

    def to_pandas(self) -> Any:
        """Return a pandas data frame of loss, count and further columns; a row for each sample.

        Samples without a loss have NaN there; where some could not be read, `skipped` says why.

        Raises:
            ImportError: pandas is not installed.

        Example:
            >>> Scores(torch.tensor([0.5, 1.0]), torch.tensor([4, 2])).to_pandas()
               loss  count
            0   0.5      4
            1   1.0      2
        """
        return to_frame(self)

    def token_losses(self, index: int) -> Tensor:
        """Return the losses of sample `index`'s targets, in order: (counts[index],) float32.

        Raises:
            ValueError: the scores were made without `token_losses=True`.
            IndexError: there is no such sample.

        Example:
            >>> losses, counts = torch.tensor([1.0, 2.0]), torch.tensor([2, 1])
            >>> scores = Scores(losses, counts, token_losses=torch.tensor([0.5, 1.5, 2.0]))
            >>> scores.token_losses(0)
            tensor([0.5000, 1.5000])
        """
        if self.flat_token_losses is None:
            raise ValueError(
                "these scores hold no token losses; score with LossScorer(..., token_losses=True)"
            )
        if not -len(self) <= index < len(self):
            raise no_such_row(index, len(self))
        if self._offsets is None:
            self._offsets = offsets_of(self.counts)
        index %= len(self)
        return self.flat_token_losses[self._offsets[index] : self._offsets[index + 1]]

    def weights(
        self,
        temperature: Temperature = "median",
        *,
        column: str = "loss",
        missing: Missing = "raise",
        normalize: Normalize = "none",
        max_weight: float | None = None,
    ) -> Tensor:
        """Return the FLOW weights exp(−loss / temperature), as `flow_weights` makes them.

        They are (N,) float32, in [0, 1] unless they are normalised.

        Args:
            temperature: as in `resolve_temperature`; taken over the samples that have a loss.
            column: which of `columns` takes the loss's place: ``"entropy"``,
                ``"gradient_norm"``, or one of your own, which must be small where a sample is
                easy and never negative. ``"correct"`` is large where a sample is easy.
            missing: what becomes of samples without a loss: ``"raise"``, or ``"zero"``, which
                gives them weight 0.
            normalize: ``"mean"`` divides the weights by their mean over all N samples.
            max_weight: caps the weights, after normalising (`weights.shape_weights`).

        Raises:
            ValueError: samples without a loss under ``missing="raise"`` (their indices named),
                no sample with one, no such column or ``"correct"``, a negative value, or an
                unusable `temperature`, `normalize` or `max_weight`.
        """
        values = self.losses if column == "loss" else self._column(column)
        weights = weigh_present(values, temperature, missing=missing, column=column)
        warn_of_useless_weights(
            values,
            weights,
            temperature,
            is_normalized=normalize == "mean",
            name=plural(column),
        )
        return shape_weights(weights, normalize=normalize, max_weight=max_weight)

    def _column(self, name: str) -> Tensor:
        """The column that takes the loss's place, if it can."""
        if name == "correct":
            raise ValueError(
                "column='correct' is 1 where the model is right, and weights need values that are "
                "small there; make them of 1 - scores.columns['correct'] with flow_weights and a "
                "positive float as temperature, or pass column='entropy' or 'gradient_norm'"
            )
        if name not in self.columns:
            others = f" or one of {sorted(self.columns)}" if self.columns else ": there is no other"
            raise ValueError(
                f"column must be 'loss'{others}, got {name!r}; score with "
                "LossScorer(..., columns=...) to have more"
            )
        if name not in SMALL_WHERE_EASY:
            say_once(
                f"column {name!r} takes the loss's place: small values are taken for easy samples"
            )
        return self.columns[name]

    def check_dataset(self, dataset: Any, *, view: bool = True) -> None:
        """Check that `dataset` is the one these scores were made from.

        Scores that `flowdata score` made are of rows of text: the rows are compared by the columns
        that were read, whatever loaded them and whatever columns they have beside; where they have
        no text any more, by their tokens. Scores made under a `dataset_id` of the user's own, from
        losses computed elsewhere, are checked for their length alone. A part of other scores is
        checked for its length and, of samples with labels, for each one's number of targets. What
        a list, a Subset or a TensorDataset held is recognised in other classes too, by reading all
        of it; what a class of the user's gave is recognised in that class alone.

        Args:
            dataset: map-style.
            view: whether the transform, format and columns of a Hugging Face data set must be
                the same too; False compares the rows alone.

        Raises:
            ScoreMismatchError: another length, other content, or another view of it.
        """
        if len(dataset) != len(self):
            raise ScoreMismatchError(
                f"the scores are of {len(self)} samples, the data set has {len(dataset)}; "
                "score this data set; or, where it is some of the rows that were scored, select "
                "their scores by the same indices, scores[keep]"
            )
        check_match(self.metadata, self.counts, dataset, view=view)

    def to_column(
        self,
        hf_dataset: Any,
        name: str = "weight",
        *,
        temperature: Temperature = "median",
        missing: Missing = "raise",
    ) -> Any:
        """Return the Hugging Face data set with the weights as a float32 column `name`.

        Args:
            hf_dataset: the `datasets.Dataset` that was scored. Its rows must be the same; a
                column holds whatever transform or format shows them.
            name: the new column's.
            temperature: as for `weights`.
            missing: as for `weights`.

        Raises:
            TypeError: not a Hugging Face data set, or a stream or dictionary of them.
            ScoreMismatchError: the scores were made from another data set.
            ValueError: it has such a column already, `name` is none, or weights can't be made.
        """
        check_takes_column(hf_dataset, name)
        self.check_dataset(hf_dataset, view=False)
        weights = self.weights(temperature, missing=missing)
        return hf_dataset.add_column(name, weights.numpy().astype(np.float32))

    def summary(self, temperature: Temperature = "median") -> dict[str, Any]:
        """Return the figures that describe the losses and the weights made from them."""
        return summarize(self.losses, self.counts, temperature=temperature)

    def plot(self, path: str | Path, *, temperature: Temperature = "median") -> Path:
        """Draw the distribution of losses and weights into a PNG and return its path."""
        unit = unit_of(self.metadata)
        return plot_losses(self.losses, path, temperature=temperature, unit=unit)

    @classmethod
    def load(cls, path: str | Place) -> Scores:
        """Return the scores kept in a store folder or a `.safetensors` file.

        Args:
            path: on a disk, or a URL (see `flowdata.store.places`).

        Raises:
            FileNotFoundError: nothing is there.
            ValueError: it is no finished store, or its content is damaged.
        """
        return cls.from_tensors(*read_store(place_of(path)))

    def save(self, path: str | Place) -> Place:
        """Write the scores into a folder, or a file if the name ends in `.safetensors`.

        Args:
            path: on a disk, or a URL (see `flowdata.store.places`).
        """
        return write_store(self.to_tensors(), self.manifest(), place_of(path))

    @classmethod
    def from_tensors(cls, tensors: Mapping[str, Tensor], manifest: Manifest) -> Scores:
        """Return the scores that a store's tensors and manifest hold (see `store/format.py`)."""
        return cls(
            tensors["loss"],
            tensors["count"],
            metadata=dict(manifest),
            token_losses=tensors.get("token_loss"),
            columns={name: tensors[name] for name in tensors.keys() - STORE_TENSORS},
        )

    def to_tensors(self) -> dict[str, Tensor]:
        """Return the tensors that a store keeps of the scores; the losses are not copied."""
        tensors = {**self.columns, "loss": self.losses, "count": self.counts}
        if self.flat_token_losses is not None:
            tensors["token_loss"] = self.flat_token_losses
            tensors["token_offset"] = offsets_of(self.counts)
        return tensors

    def manifest(self) -> Manifest:
        """Return the manifest of a store of these scores, made from their metadata."""
        fields = {name: self.metadata.get(name, {}) for name in (*FIELDS, "checked")}
        return make_manifest(**fields)
