"""The drift meter: keeps what a frozen model makes of a probe, and compares later models with it.

    before training    frozen model ── rows ──→ kept, with its output layer
    any time later     tuned model  ── rows ──→ both output layers, tile by tile → Drift

No second model is in memory: the frozen one's rows are the inputs of its output layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import replace
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from flowdata._common.data_sets import check_map_style
from flowdata._common.offsets import offsets_of
from flowdata._common.rng import preserved_rng
from flowdata.dataset import FlowWeightedDataset
from flowdata.drift.batch_norm import BatchNormState
from flowdata.drift.drift import Drift
from flowdata.drift.refusals import check_batch_norm, check_logits, check_model, check_numbers
from flowdata.drift.renewed import Renewed
from flowdata.drift.rows import Reader, Rows
from flowdata.drift.several import divergences_of_answers, has_several_labels
from flowdata.drift.which_head import HeadChoice, WhichHead, check_head, of_shared_classes
from flowdata.head.kl import Predictions, count_classes, divergences, logits_of
from flowdata.head.output_layer import Head, kernels
from flowdata.models.calling import unwrapped
from flowdata.models.copies import deep_copied
from flowdata.models.evaluation import in_evaluation
from flowdata.models.precision import name_of, without_autocast
from flowdata.scoring.collate import Collate
from flowdata.store.identity import features_identity
from flowdata.store.kept import check_name, keep

BatchNorm = Literal["reference", "own"]


class DriftMeter:
    """Measures how far models have drifted from a frozen one, without the data it was trained on.

    Source: forgetting follows KL(base ‖ tuned): "RL's Razor", arXiv:2509.04259.

    Args:
        model: the model before training, with its output layer: a body makes no predictions. It
            comes back as it was, and need not be kept.
        probe: samples to compare models on, map-style: `drift.own_text`, `drift.smooth_images`,
            the new task's own samples, or any others. Labels say which tokens count, or, where a
            sample has one for each class, that a model says yes or no to each.
        collate_fn: list of samples -> batch, as a DataLoader takes it; None pads token samples and
            stacks others.
        store: a file, ``*.safetensors``, or its URL, that keeps what the frozen model makes of
            the probe.
        batch_norm: ``"reference"`` measures with the frozen model's BatchNorm parameters and
            statistics, as the old task would be served (Sanyal et al., arXiv:2502.02797, section
            5); ``"own"`` with the tuned model's.
        head: ``"own"`` measures tuned models by their own output layer, which has to be the frozen
            model's in a later state; ``"frozen"`` by the frozen model's, as the old task would
            be served where a new task has a layer of its own; ``"auto"`` tells which by the layer's
            weights. A language model's is its own, by the tokens that both have.
        dtype: ``"auto"`` is the model's own; else see `LossScorer`. In bfloat16 the KL of models
            that lie close together is rounding for a good part.
        dataset_id: names the probe's content for `store`; None fingerprints its samples.
        progress: show it, on the first rank, where reading the probe takes more than a few seconds.

    Raises:
        TypeError, ValueError: an argument that is none of these; a probe without targets; a model
            that gives no numbers, probabilities or other things than logits, such as features
            where its output layer was cut off, or other ones each time it is run.
        ScoreMismatchError: `store` is of another model, probe or dtype.

    Example:
        Three lines for any loop: one before training, two where the loop validates.

        >>> _ = torch.manual_seed(0)
        >>> model = nn.Sequential(nn.Linear(4, 8), nn.ReLU(), nn.Linear(8, 3))
        >>> meter = DriftMeter(model, torch.randn(9, 4))
        >>> optimizer, costs = torch.optim.SGD(model.parameters(), lr=0.5), {}
        >>> for step in range(1, 101):
        ...     loss = F.cross_entropy(model(torch.randn(8, 4)), torch.randint(3, (8,)))
        ...     loss.backward()
        ...     optimizer.step()
        ...     optimizer.zero_grad()
        ...     if step % 50 == 0:
        ...         drift = meter(model)  # as cheap as a pass over the probe
        ...         costs[step] = float(loss) + drift.kl  # of which the least is best
        >>> 0 < drift.kl < float("inf"), list(costs)
        (True, [50, 100])
    """

    def __init__(
        self,
        model: nn.Module,
        probe: Any,
        collate_fn: Collate | None = None,
        store: str | Path | None = None,
        *,
        batch_norm: BatchNorm = "reference",
        head: HeadChoice = "auto",
        dtype: str | torch.dtype = "auto",
        dataset_id: str | None = None,
        progress: bool = True,
    ) -> None:
        check_model(model)
        check_batch_norm(batch_norm)
        check_head(head)
        check_map_style(probe)
        check_name(store, dataset_id)
        if len(probe) == 0:
            raise ValueError("probe is empty: there is nothing to compare models on")
        if isinstance(probe, FlowWeightedDataset):
            probe = probe.dataset
        model = unwrapped(model)
        self.batch_norm: BatchNorm = batch_norm
        with in_evaluation(model), preserved_rng():
            self.reader = Reader(model, probe, collate_fn, dtype, progress=progress)
            labels: list[Tensor | None] = []
            rows = self._reference_rows(model, probe, collate_fn, store, dataset_id, labels)
            if not len(rows.values):
                raise ValueError("probe has no target: all its labels are −100")
            classes = count_classes(Predictions(rows.values[:1], rows.layer))
            check_numbers(rows)
            check_logits(rows, classes)
            self.has_several_labels = not self.reader.is_of_language and has_several_labels(
                model,
                labels or self.reader.labels(),  # none are noted where the rows were kept
                classes,
                one_each=bool((rows.counts == 1).all()),
            )
        with torch.inference_mode(False):  # else no gradient could go through what is kept
            self._rows = replace(rows, values=rows.values.clone(), layer=_frozen(rows.layer))
            self._batch_norm_state = BatchNormState(model)
        is_of_language = self.reader.is_of_language
        self._which_head = WhichHead(self._rows.layer, head, is_of_language=is_of_language)
        self._renewed = Renewed(model)

    def _reference_rows(
        self,
        model: nn.Module,
        probe: Any,
        collate_fn: Collate | None,
        store: str | Path | None,
        dataset_id: str | None,
        labels: list[Tensor | None],
    ) -> Rows:
        """The frozen model's rows, from the file if there is one; else its labels are noted."""
        noted = None if self.reader.is_of_language else labels
        if store is None:
            return self.reader.read(model, noted)
        identity = features_identity(
            body=model,
            dataset=probe,
            dataset_id=dataset_id,
            collate_fn=collate_fn,
            dtype=name_of(self.reader.dtype),
        )
        identity["kind"] = "drift"

        def make() -> dict[str, Tensor]:
            rows = self.reader.read(model, noted)
            return {"row": rows.values, "count": rows.counts}

        tensors = keep(store, identity, make)
        return Rows(tensors["row"], tensors["count"], self.reader.layer(model))

    def __call__(self, model: nn.Module, *, batch_norm: BatchNorm | None = None) -> Drift:
        """Return the drift of a model of the same body.

        Args:
            model: in any mode, wrapped or not, with adapters or not; it comes back as it was.
            batch_norm: None takes the meter's.

        Raises:
            ValueError: the model has another body: its output layer is given another width, or it
                has none.
        """
        check_model(model)
        check_batch_norm(batch_norm or self.batch_norm)
        model = unwrapped(model)
        # The output layer may have to be called, once the reader has given the model back.
        with in_evaluation(model), self.batch_norm_in(model, batch_norm), preserved_rng():
            rows = self.reader.read(model)
            self._renewed.warn(model, rows.layer)
            return self._compare(rows)

    def is_own(self, layer: Head | nn.Module) -> bool:
        """Return whether a model's own output layer makes the predictions that are compared."""
        return self._which_head.is_own(layer)

    def __len__(self) -> int:
        """Return the number of samples in the probe."""
        return len(self._rows.counts)

    def batch_norm_in(
        self, model: nn.Module, batch_norm: BatchNorm | None = None
    ) -> AbstractContextManager[None]:
        """Return a block in which a model's BatchNorm layers are those to measure it with.

        Args:
            model: see `__call__`.
            batch_norm: see `__call__`.
        """
        is_own = (self.batch_norm if batch_norm is None else batch_norm) == "own"
        if is_own:
            return nullcontext()
        return self._batch_norm_state.put_into(model, self.reader.frozen_head)

    def base_of(self, places: Sequence[int], device: torch.device) -> Predictions:
        """Return the frozen model's predictions of some samples.

        Args:
            places: the samples' places in the probe.
            device: where they are needed.
        """
        offsets = offsets_of(self._rows.counts).tolist()
        parts = [self._rows.values[offsets[k] : offsets[k + 1]] for k in places]
        return Predictions(torch.cat(parts).to(device), _on(self._rows.layer, device))

    def outputs(self) -> Tensor:
        """Return what the frozen model makes of the probe: (N, C) float32 logits, on the CPU.

        Raises:
            ValueError: the model has more than one prediction for a sample, as those of language
                and of several labels have.
        """
        if self.has_several_labels:
            raise ValueError(
                "outputs() is for models that say which class it is, and this one says yes or no "
                "to each: hold it with OutputAnchor"
            )
        if self.reader.is_of_language or (self._rows.counts != 1).any():
            raise ValueError(
                "outputs() is for models with one prediction for a sample; those of every token "
                "would be too large to keep: hold the model with OutputAnchor, which makes them "
                "tile by tile"
            )
        cpu = torch.device("cpu")
        layer = _on(self._rows.layer, cpu)
        with torch.no_grad(), without_autocast(cpu):
            return logits_of(Predictions(self._rows.values.cpu(), layer))

    def _compare(self, rows: Rows) -> Drift:
        base, device = self._rows, rows.values.device
        if rows.values.shape != base.values.shape:
            raise ValueError(
                f"the model's output layer is given {tuple(rows.values.shape)} values for the "
                f"probe, the frozen model's was given {tuple(base.values.shape)}: it has another "
                "body; make a meter of the model that this one was tuned from"
            )
        layer = _on(base.layer, device)
        is_own = self.is_own(rows.layer)
        frozen = Predictions(base.values.to(device), layer)
        tuned = Predictions(rows.values, rows.layer if is_own else layer)
        if self.reader.is_of_language:
            frozen, tuned = of_shared_classes(frozen, tuned)
        measure = divergences_of_answers if self.has_several_labels else divergences
        kl, reverse_kl, agreement = measure(frozen, tuned)
        cosine = F.cosine_similarity(frozen.rows.double(), tuned.rows.double(), dim=1)
        per_target = {
            "kl": kl,
            "reverse_kl": reverse_kl,
            "cosine": cosine.nan_to_num(0.0, 0.0, 0.0),
            "agreement": agreement,
        }
        means = {name: float(values.mean()) for name, values in per_target.items()}
        per_sample = {
            name: torch.segment_reduce(values.cpu(), "mean", lengths=base.counts)
            for name, values in per_target.items()
        }
        return Drift(
            **means,
            samples=len(base.counts),
            head="own" if is_own else "frozen",
            of="tokens" if self.reader.is_of_language else "samples",
            per_sample=per_sample | {"targets": base.counts},
        )


def _frozen(layer: Head | nn.Module) -> Head | nn.Module:
    """A copy of an output layer, which training leaves as it is."""
    if isinstance(layer, nn.Module):
        return deep_copied(layer).eval().requires_grad_(False)
    bias = None if layer.bias is None else layer.bias.clone()
    return replace(layer, weight=layer.weight.clone(), bias=bias)


def _on(layer: Head | nn.Module, device: torch.device) -> Head | nn.Module:
    if isinstance(layer, nn.Module):
        return layer.to(device)
    bias = None if layer.bias is None else layer.bias.to(device)
    moved = replace(layer, weight=layer.weight.to(device), bias=bias, kernel="eager")
    return kernels(moved, compiled=False)[0][1]
