"""Rows: what output layers are given for the samples of a probe, of one model after another.

Every model is read as it is scored: by packs of one plan, in one dtype, by a way that was compared
with samples run alone. Rows are therefore the same to the last bit whoever reads them, on machines
of one kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import is_first_rank, logger
from flowdata._common.progress import progress_bar
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import Readable
from flowdata.drift.check import find_suspect, right_way
from flowdata.drift.headless import check_has_head
from flowdata.drift.heads import name_of_head
from flowdata.drift.several import rows_of_labels, with_note
from flowdata.drift.ways import (
    output_layer,
    output_module,
    ways_in_training,
    ways_to_rows,
)
from flowdata.drift.witnesses import Witnesses
from flowdata.head.output_layer import Head
from flowdata.models.batch_norm import check_batch_norm
from flowdata.models.calling import innermost, output_layer_of
from flowdata.models.copies import Kept, converting_inputs
from flowdata.models.failing import explain_failure
from flowdata.models.placement import home, is_placed, reshard
from flowdata.models.precision import dtype_of, name_of, resolve_dtype
from flowdata.models.tensors import to_device
from flowdata.scoring.candidates import Candidate
from flowdata.scoring.collate import Collate, check_stackable, choose_collate
from flowdata.scoring.job import Job
from flowdata.scoring.lend import lent_model
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.planning import make_plan
from flowdata.store.fingerprint.dataset import random_sample
from flowdata.store.packs import reorder
from flowdata.targets.labels import IGNORE_INDEX, split_batch
from flowdata.targets.predictions import predict
from flowdata.targets.target_losses import TargetLosses, joined
from flowdata.targets.which_loss import LANGUAGE_LOSSES, loss_of_model

_PREDICTIONS = "cross_entropy"  # stands for all losses that are none of a language model


@dataclass(frozen=True)
class Rows:
    """The inputs of a model's output layer, and the layer.

    Attributes:
        values: (n, d) floating, sample after sample, on the model's device.
        counts: (N,) int64, rows of each sample.
        layer: makes logits of rows, as the model has it.
    """

    values: Tensor
    counts: Tensor
    layer: Head | nn.Module


class Reader:
    """Reads rows of any model of one body.

    Args:
        model: the first model to read, which decides on dtype, collation and packs.
        probe: map-style, not empty.
        collate_fn: list of samples -> batch; None pads token samples and stacks others.
        dtype: see `LossScorer`.
        progress: whether that of readings is shown, on the first rank, where they take long.
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        collate_fn: Collate | None,
        dtype: str | torch.dtype,
        *,
        progress: bool,
    ) -> None:
        check_batch_norm(model, of="prediction")
        if (random := random_sample(probe)) is not None:
            raise ValueError(
                f"probe[{random[0]}] differs from reading to reading, as random augmentation makes "
                "it, so that no two models can be compared on it: give the samples without it"
            )
        dataset = Readable(probe, skip=False)
        first = dataset[0]
        loss = _language_loss(model, first)
        collate = choose_collate(collate_fn, first, model, loss or _PREDICTIONS)
        if collate_fn is None and loss is None:
            check_stackable(first)
        self._job = Job(
            model=model,
            loss=loss or _PREDICTIONS,
            dtype=resolve_dtype(dtype, model, home(model), one_target=True),
            device=home(model),
            reference="model",
            token_losses=False,
            columns=(),
            compile=False,
            max_tokens=None,
            batch_size=None,
            dataset=dataset,
            collate=_with_labels(collate) if loss == "masked_lm" else collate,
            lengths=None,
            num_workers=0,
            progress=progress and is_first_rank(),
            announce=logger.info,
        )
        self._witnesses = Witnesses(len(probe), self._batch_of)
        self._plan: Plan = make_plan(self._job, torch.get_num_threads(), {})
        self._right_ways: dict[Hashable, str] = {}  # names, by the structure of models
        self._last_ways: dict[Hashable, str] = {}  # by which models were read at last
        self._heads: dict[Hashable, str | None] = {}
        self.frozen_head: str | None = None  # of the first model, by name
        self._kept_inputs: Kept = {}  # of models in training
        if not self.is_of_language:
            with lent_model(self._job, self._plan.options) as lent:
                self.frozen_head = self._first_head(lent)
        self._job = replace(self._job, model=nn.Module())  # the first model may go

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which models are read."""
        return self._job.dtype

    @property
    def is_of_language(self) -> bool:
        """Whether rows are those of a language model's targets."""
        return self._job.loss in LANGUAGE_LOSSES

    def first_batch(self) -> Any:
        """Return a batch of the probe's first sample."""
        return self._batch_of(0)

    def _batch_of(self, place: int) -> Any:
        return self._job.collate([self._job.dataset[place]])

    def labels(self) -> Iterator[Tensor | None]:
        """Yield each sample's labels, as `read` hands them out."""
        size, name = len(self._job.dataset), "drift: reading the labels"
        with progress_bar(size, name, "samples", shown=self._job.progress, patient=True) as advance:
            for index in range(size):
                yield rows_of_labels(self._batch_of(index))
                advance(1)

    def read(self, model: nn.Module, labels: list[Tensor | None] | None = None) -> Rows:
        """Return a model's rows; the model comes back as it was.

        Args:
            model: the model.
            labels: is given the (B, C) labels of each batch that is read, None for labels of
                another shape. Samples that are checked are in more than one batch.

        Raises:
            ValueError: no way gives samples the rows that they have alone, the model has no such
                layer as the first one that was read, or the probe has changed.
        """
        self._witnesses.check()
        job = self._job_of(model)
        if labels is not None:
            job = replace(job, collate=with_note(job.collate, labels))
        with lent_model(job, self._plan.options) as lent:
            head = self._head_of(lent)
            rows = self._read(job, lent, head)
        layer = output_layer(model, job.loss, head)
        reshard(model)
        return Rows(rows.values, rows.counts, layer)

    def read_in_training(self, model: nn.Module, places: Sequence[int]) -> Rows:
        """Return the rows of some samples with their gradients, read off the model as it stands.

        Samples are run together where `read` runs them together, and else as it does. Where no
        model was read yet, this one is read first.

        Args:
            model: as it is trained.
            places: the samples' places in the probe.

        Raises:
            ValueError: see `read`.
        """
        job = self._job_of(model)
        with converting_inputs(model, dtype_of(model), self._kept_inputs):
            head = self._head_in_training(model)
            way = self._way_in_training(job, model, head)
            groups = way.grouping([job.dataset[place] for place in places])
            rows = joined([way.way(model, job.collate(group)) for group in groups])
        return Rows(rows.values, rows.counts, output_module(model, job.loss, head))

    def layer(self, model: nn.Module) -> Head | nn.Module:
        """Return the layer that makes logits of a model's rows."""
        job = self._job_of(model)
        with lent_model(job, self._plan.options) as lent:
            head = self._head_of(lent)
        return output_layer(model, job.loss, head)

    def _head_in_training(self, model: nn.Module) -> str | None:
        """The name of the layer whose inputs are rows, looked for once for each structure."""
        structure = _structure(model)
        if structure not in self._heads:
            with torch.no_grad():
                self._heads[structure] = self._head_of(model)
        return self._heads[structure]

    def _head_of(self, model: nn.Module) -> str | None:
        """The name of the layer whose inputs are rows; None where these are logits."""
        frozen = self.frozen_head
        if self.is_of_language and output_layer_of(model) is None:
            raise ValueError(
                f"{type(model).__name__} names no output layer (`get_output_embeddings`), and the "
                "frozen model did; pass the language model itself, without what is around it"
            )
        if self.is_of_language or frozen is None:
            return None
        name = self._name_of_head(model)
        # What has taken the place of the frozen model's layer, several layers or none, is given
        # the same rows.
        if name is None or name.startswith(f"{frozen}."):
            name = frozen if frozen in dict(model.named_modules()) else None
        if name is None:
            raise ValueError(
                f"no linear layer makes the logits of {type(model).__name__}, and it has no layer "
                f"{frozen!r}, which made those of the frozen model: it has another body; make a "
                "meter of the model that this one was tuned from"
            )
        return name

    def _first_head(self, model: nn.Module) -> str | None:
        """The head's name; the first run of all, which tells whether the model takes the probe."""
        try:
            name = self._name_of_head(model)
        except RuntimeError as error:
            explain_failure(error, self.first_batch(), "the probe's first sample")
            raise
        if name is None:
            inputs = to_device(split_batch(self.first_batch())[0], home(model))
            check_has_head(model, lambda: predict(model, inputs))
        return name

    def _name_of_head(self, model: nn.Module) -> str | None:
        return name_of_head(model, self.first_batch(), home(model))

    def _job_of(self, model: nn.Module) -> Job:
        dtype = resolve_dtype("auto", model, home(model)) if is_placed(model) else self.dtype
        return replace(self._job, model=model, device=home(model), dtype=dtype)

    def _right_way(self, job: Job, model: nn.Module, head: str | None) -> Candidate:
        """The fastest way to the rows that samples have alone, looked for once a structure."""
        if job.suspects:  # of this model alone: the frozen one is read as it was before
            return right_way(job, self._plan, model, head)
        structure = _structure(model)
        if structure not in self._right_ways:
            self._right_ways[structure] = right_way(job, self._plan, model, head).name
        ways = ways_to_rows(job, self._plan, model, head)
        return next(way for way in ways if way.name == self._right_ways[structure])

    def _way_in_training(self, job: Job, model: nn.Module, head: str | None) -> Candidate:
        """The way by which models of this structure are read; padded where that is packed.

        A structure that was not read yet, such as one with adapters, goes the frozen model's way.
        """
        if not self._last_ways:  # the frozen model's rows come from a file
            with preserved_rng():
                self.read(model)
        first = next(iter(self._last_ways.values()))
        name = self._last_ways.get(_structure(model), first)
        ways = ways_in_training(job, model, head)
        return next((way for way in ways if way.name == name), ways[0])

    def _read(self, job: Job, model: nn.Module, head: str | None) -> TargetLosses:
        """The rows of all samples; of one that turns out wrong another way has to be right."""
        way = self._right_way(job, model, head)
        rows = self._by_way(job, model, way)
        suspect = find_suspect(job, self._plan, model, head, way, rows)
        if suspect is None:
            return rows
        if suspect in job.suspects:  # right beside few samples and wrong beside more
            *_, way = ways_to_rows(job, self._plan, model, head)
            rows = self._by_way(job, model, way)
            if find_suspect(job, self._plan, model, head, way, rows) is None:
                return rows
            raise ValueError(
                f"the model makes other predictions of sample {suspect} each time it is run in "
                f"{name_of(job.dtype)}; it has to be deterministic in eval mode, and where it "
                "rounds too much in a low precision, the meter needs dtype='float32'"
            )
        return self._read(replace(job, suspects=(*job.suspects, suspect)), model, head)

    def _by_way(self, job: Job, model: nn.Module, way: Candidate) -> TargetLosses:
        self._last_ways[_structure(model)] = way.name
        parts: list[TargetLosses] = []
        size, name = len(job.dataset), "drift: reading the probe"
        with progress_bar(size, name, "samples", shown=job.progress, patient=True) as advance:
            for number in range(len(self._plan)):
                pack = self._plan.pack(number).tolist()
                groups = way.grouping([job.dataset[index] for index in pack])
                parts += [way.way(model, job.collate(group)) for group in groups]
                advance(len(pack))
        rows = joined(parts)
        columns = {"count": rows.counts, "token_loss": rows.values}
        columns = reorder(columns, self._plan.order.argsort())
        return TargetLosses(columns["token_loss"], columns["count"])


def _structure(model: nn.Module) -> Hashable:
    """What decides on whether a way is right: the modules of a model, not their values."""
    return tuple((name, type(module)) for name, module in model.named_modules())


def _language_loss(model: nn.Module, sample: Any) -> str | None:
    """The loss that says which positions have a target; None for a model of other predictions."""
    inner = innermost(model)
    if output_layer_of(model) is None or not isinstance(sample, Mapping):
        return None
    loss = loss_of_model(model)
    if loss in LANGUAGE_LOSSES:
        return loss
    config: Any = getattr(inner, "config", None)
    return "seq2seq_lm" if getattr(config, "is_encoder_decoder", False) else "causal_lm"


def _with_labels(collate: Collate) -> Collate:
    """Return a collation in which every token is a target where samples have no labels."""

    def collate_with_labels(samples: list[Any]) -> Any:
        batch = collate(samples)
        if split_batch(batch)[1] is None:
            mask = batch["attention_mask"] == 0
            batch = {**batch, "labels": batch["input_ids"].masked_fill(mask, IGNORE_INDEX)}
        return batch

    return collate_with_labels
