"""Rows: what output layers are given for the samples of a probe, of one model after another.

Every model is read as it is scored: by packs of one plan, in one dtype, by a way that was compared
with samples run alone. Rows are therefore the same to the last bit whoever reads them, on machines
of one kind.
"""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata._common.notices import logger
from flowdata._common.unreadable import Readable
from flowdata.drift.ways import (
    RowsWay,
    name_of_head,
    output_layer,
    output_module,
    padded_way,
    target_logits,
    ways_to_rows,
)
from flowdata.head.kl import Predictions, divergences
from flowdata.head.output_layer import Head
from flowdata.models.calling import innermost, output_layer_of
from flowdata.models.placement import home, is_placed, reshard
from flowdata.models.precision import has_memory_for_copy, resolve_dtype
from flowdata.scoring.collate import Collate, check_stackable, choose_collate
from flowdata.scoring.job import Job
from flowdata.scoring.kinds import differing
from flowdata.scoring.lend import lent_model
from flowdata.scoring.plan.packs import Plan
from flowdata.scoring.planning import make_plan
from flowdata.store.packs import reorder
from flowdata.targets.labels import IGNORE_INDEX, split_batch
from flowdata.targets.target_losses import TargetLosses, joined
from flowdata.targets.which_loss import LANGUAGE_LOSSES, loss_of_model

_MOST_CHECKED = 4  # samples that are run alone before a model is read
# Nats by which the predictions of samples run together may differ from those of samples run alone:
# as much is rounding in any case. Beyond it a low dtype's own error is measured, and taken twice.
_ROUNDING = 2e-6
_MOST_ROUNDING = 5e-3  # where no float32 copy of the model fits into memory
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
    """

    def __init__(
        self, model: nn.Module, probe: Any, collate_fn: Collate | None, dtype: str | torch.dtype
    ) -> None:
        dataset = Readable(probe, skip=False)
        first = dataset[0]
        loss = _language_loss(model, first)
        collate = choose_collate(collate_fn, first, model, loss or _PREDICTIONS)
        if collate_fn is None and loss is None:
            check_stackable(first)
        self._job = Job(
            model=model,
            loss=loss or _PREDICTIONS,
            dtype=resolve_dtype(dtype, model, home(model), one_target=loss is None),
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
            progress=False,
            announce=logger.info,
        )
        self._plan: Plan = make_plan(self._job, torch.get_num_threads(), None)
        self._right_ways: dict[Hashable, str] = {}  # names, by the structure of models
        self._heads: dict[Hashable, str | None] = {}

    @property
    def dtype(self) -> torch.dtype:
        """The dtype in which models are read."""
        return self._job.dtype

    @property
    def is_of_language(self) -> bool:
        """Whether rows are those of a language model's targets."""
        return self._job.loss in LANGUAGE_LOSSES

    def read(self, model: nn.Module) -> Rows:
        """Return a model's rows; the model comes back as it was.

        Raises:
            ValueError: no way gives samples the rows that they have alone.
        """
        job = self._job_of(model)
        with lent_model(job, self._plan.options) as lent:
            head = None if self.is_of_language else name_of_head(lent, self._first(job), job.device)
            way = self._right_way(job, lent, head)
            packs = [self._plan.pack(index).tolist() for index in range(len(self._plan))]
            rows = joined([_read(job, lent, way, [job.dataset[i] for i in p]) for p in packs])
            columns = reorder(
                {"count": rows.counts, "token_loss": rows.values}, self._plan.order.argsort()
            )
        layer = output_layer(model, job.loss, head)
        reshard(model)
        return Rows(columns["token_loss"], columns["count"], layer)

    def read_in_training(self, model: nn.Module, places: Sequence[int]) -> Rows:
        """Return the rows of some samples with their gradients, read off the model as it stands.

        Args:
            model: as it is trained.
            places: the samples' places in the probe.
        """
        job = self._job_of(model)
        head = self._head_in_training(job, model)
        batch = job.collate([job.dataset[place] for place in places])
        rows = padded_way(job, model, head)(model, batch)
        return Rows(rows.values, rows.counts, output_module(model, job.loss, head))

    def _head_in_training(self, job: Job, model: nn.Module) -> str | None:
        """The name of the layer that makes the logits, looked for once for each structure."""
        if self.is_of_language:
            return None
        structure = _structure(model)
        if structure not in self._heads:
            with torch.no_grad():
                self._heads[structure] = name_of_head(model, self._first(job), job.device)
        return self._heads[structure]

    def layer(self, model: nn.Module) -> Head | nn.Module:
        """Return the layer that makes logits of a model's rows."""
        job = self._job_of(model)
        with lent_model(job, self._plan.options) as lent:
            head = None if self.is_of_language else name_of_head(lent, self._first(job), job.device)
        return output_layer(model, job.loss, head)

    def _job_of(self, model: nn.Module) -> Job:
        dtype = resolve_dtype("auto", model, home(model)) if is_placed(model) else self.dtype
        return replace(self._job, model=model, device=home(model), dtype=dtype)

    def _first(self, job: Job) -> Any:
        return job.collate([job.dataset[0]])

    def _right_way(self, job: Job, model: nn.Module, head: str | None) -> RowsWay:
        """The fastest way to the rows that samples have alone, found once for each structure."""
        structure = _structure(model)
        if structure not in self._right_ways:
            samples = [job.few_samples[k] for k in differing(job.few_samples, _MOST_CHECKED)]
            self._right_ways[structure] = _find_right_way(job, self._plan, model, head, samples)
        ways = ways_to_rows(job, self._plan, model, head)
        return next(way for way in ways if way.name == self._right_ways[structure])


def _find_right_way(
    job: Job, plan: Plan, model: nn.Module, head: str | None, samples: list[Any]
) -> str:
    """The name of the first way that gives samples the predictions that they have alone."""
    ways = ways_to_rows(job, plan, model, head)
    true = _predictions(job, model, head, ways[-1], samples)
    if not len(true.rows) or not true.rows.isfinite().all():
        return ways[0].name  # there is nothing to compare, or the model diverged: any way tells
    _check_output_layer(job, model, samples[0], true)
    allowance = _ROUNDING
    for way in ways:
        try:
            together = _predictions(job, model, head, way, samples)
            off = float(divergences(true, together).kl.max())
        except Exception as error:  # whatever it is, another way may do without
            logger.warning("not reading %s: %s", way.name, str(error).partition("\n")[0])
            continue
        if off > allowance == _ROUNDING:
            allowance += 2 * _cost_of_dtype(job, plan, head, samples, true)
        if off <= allowance:
            return way.name
        logger.warning("not reading %s: predictions differ by %.2g nats", way.name, off)
    raise ValueError(
        "the model makes other predictions of a sample each time it is run alone; it has to be "
        "deterministic in eval mode"
    )


def _read(job: Job, model: nn.Module, way: RowsWay, samples: list[Any]) -> TargetLosses:
    """The rows of samples, in their order."""
    return joined([way.way(model, job.collate(group)) for group in way.grouping(samples)])


def _predictions(
    job: Job, model: nn.Module, head: str | None, way: RowsWay, samples: list[Any]
) -> Predictions:
    return Predictions(_read(job, model, way, samples).values, output_layer(model, job.loss, head))


def _cost_of_dtype(
    job: Job, plan: Plan, head: str | None, samples: list[Any], true: Predictions
) -> float:
    """How far the run's dtype itself takes predictions from those in float32, in nats."""
    if job.dtype.itemsize >= 4:
        return 0.0
    exact_job = replace(job, dtype=torch.float32)
    if is_placed(job.model) or not has_memory_for_copy(job.model, torch.float32, job.device):
        return _MOST_ROUNDING / 2
    with lent_model(exact_job, plan.options) as model:
        alone = ways_to_rows(exact_job, plan, model, head)[-1]
        exact = _predictions(exact_job, model, head, alone, samples)
        return float(divergences(exact, true).kl.max())


def _check_output_layer(job: Job, model: nn.Module, sample: Any, true: Predictions) -> None:
    """Raise ValueError if a language model does more to its logits than its output layer tells."""
    if job.loss not in LANGUAGE_LOSSES:
        return
    logits = target_logits(model, job.collate([sample]), str(job.loss), job.device)
    own = Predictions(logits, nn.Identity())
    made = replace(true, rows=true.rows[: len(logits)])
    off = float(divergences(own, made).kl.max()) if len(logits) else 0.0
    if off > _MOST_ROUNDING:
        raise ValueError(
            f"the model's logits are not what its output layer makes (off by {off:.2g} nats): it "
            "changes them in a way that its configuration does not tell, so its drift can't be "
            "measured from its hidden states"
        )


def _structure(model: nn.Module) -> Hashable:
    """What decides on whether a way is right: the modules of a model, not their values."""
    return tuple((name, type(module)) for name, module in model.named_modules())


def _language_loss(model: nn.Module, sample: Any) -> str | None:
    """The loss that says which positions have a target; None for a model of other predictions."""
    inner = innermost(model)
    if output_layer_of(model) is None or not isinstance(sample, Mapping):
        return None
    loss = loss_of_model(inner)
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
