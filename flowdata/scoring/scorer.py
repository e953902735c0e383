"""LossScorer: the loss of every sample under the frozen pre-trained model, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata.fingerprint import fingerprint_callable, fingerprint_model
from flowdata.progress import say
from flowdata.rng import preserved_rng
from flowdata.scores import Scores, content_identity
from flowdata.scoring.batches import Collate, choose_collate
from flowdata.scoring.job import Job, LossFunction, make_plan
from flowdata.scoring.precision import name_of, resolve_dtype
from flowdata.scoring.run import merge_packs, run_packs
from flowdata.scoring.tasks import (
    LANGUAGE_LOSSES,
    LOSSES,
    innermost,
    loss_of_batch,
    loss_of_model,
    unwrapped,
)
from flowdata.store import (
    Manifest,
    PartWriter,
    check_identity,
    finish,
    is_finished,
    load_scores,
    locked,
    make_manifest,
    read_manifest,
    read_parts,
    write_manifest,
)

_PARTS = 200  # at most about so many parts, whatever the number of packs
_LOOKED_AT = 64  # samples from which loss="auto" tells the kind of targets


class LossScorer:
    """Scores data sets: each sample's loss under a frozen pre-trained model.

    Source: f_i(θ*) of Sanyal et al., ICML 2025, arXiv:2502.02797. The loss of a sample is the
    mean over its targets, in float32; targets of language models are the labels other than −100.

    Args:
        model: the pre-trained model. It comes back exactly as it went in: training flags, dtype,
            device, gradients, hooks; the global random generators too.
        loss: ``"causal_lm"``, ``"seq2seq_lm"``, ``"masked_lm"``, ``"cross_entropy"``,
            ``"binary_cross_entropy"``, ``"mse"``, or a callable ``(model, batch) -> (B,)``
            tensor of losses; ``"auto"`` decides from model and batch and says what it chose.
        dtype: ``"auto"`` is bfloat16 for language models where the device is fast at it, else
            the model's own: a classifier's loss rests on one target, whose rounding errors
            nothing averages out. Or ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: where to score; None is where the model is.
        max_tokens: tokens in one pack, padding included; None chooses by device.
        batch_size: most samples in one pack; None leaves that to `max_tokens`, or chooses by
            device for samples without a length.
        reference: ``"base"`` scores a PEFT model with its adapters off.
        token_losses: keep the loss of every target as well.
        compile: ``True`` runs the model through `torch.compile`; ``"auto"`` and ``False`` don't.
        progress: show a progress bar and say what was chosen.

    Raises:
        TypeError, ValueError: an argument that is none of these.

    Example:
        >>> import torch
        >>> from torch.utils.data import TensorDataset
        >>> _ = torch.manual_seed(0)
        >>> data = TensorDataset(torch.randn(6, 4), torch.tensor([0, 1, 2, 0, 1, 2]))
        >>> scorer = LossScorer(torch.nn.Linear(4, 3), dtype="float32", progress=False)
        >>> scorer.score(data)
        Scores(6 samples, 0 without a loss)
        >>> print(scorer.explain())
        cross_entropy in float32 on cpu; 1 pack of at most 64 samples
    """

    def __init__(
        self,
        model: nn.Module,
        loss: str | LossFunction = "auto",
        *,
        dtype: str | torch.dtype = "auto",
        device: str | torch.device | None = None,
        max_tokens: int | None = None,
        batch_size: int | None = None,
        reference: Literal["model", "base"] = "model",
        token_losses: bool = False,
        compile: Literal["auto"] | bool = "auto",
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(f"model must be a torch.nn.Module, got {type(model).__name__}")
        model = unwrapped(model)
        if not callable(loss) and loss not in ("auto", *LOSSES):
            raise ValueError(
                f"loss must be 'auto', one of {', '.join(map(repr, LOSSES))}, or a callable "
                f"(model, batch) -> (B,) tensor; got {loss!r}"
            )
        for name, value in (("max_tokens", max_tokens), ("batch_size", batch_size)):
            if value is not None and (not isinstance(value, int) or value < 1):
                raise ValueError(f"{name} must be a positive integer or None, got {value!r}")
        if reference not in ("model", "base"):
            raise ValueError(f"reference must be 'model' or 'base', got {reference!r}")
        if reference == "base" and not hasattr(model, "disable_adapter"):
            raise ValueError(
                "reference='base' needs a PEFT model whose adapters can be turned off, got "
                f"{type(model).__name__}; score the model itself with reference='model'"
            )
        if compile not in ("auto", True, False):
            raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
        own = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
        self.model: nn.Module = model
        self.loss = loss
        self.device = own.device if device is None else torch.device(device)
        resolve_dtype(dtype, model, self.device)  # refuses a wrong one now
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.reference = reference
        self.token_losses = token_losses
        self.compile = compile
        self.progress = progress
        self._explanation = "nothing scored yet"
        self._fingerprinted: tuple[list[tuple[int, int]], str] = ([], "")

    def explain(self) -> str:
        """Return a sentence on the last `score`: what was chosen and why."""
        return self._explanation

    def score(
        self,
        dataset: Any,
        *,
        collate_fn: Collate | None = None,
        store: str | Path | None = None,
        dataset_id: str | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        num_workers: int = 0,
        details: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Return the losses of a data set, from the store where it has them.

        Args:
            dataset: map-style: `__len__` and `__getitem__`.
            collate_fn: list of samples -> batch, as a DataLoader takes it; None pads token
                samples and stacks others.
            store: folder in which losses are kept as they are made. The same call again returns
                them without running the model; after an interruption it goes on.
            dataset_id: names the data set's content; None fingerprints its samples.
            lengths: (N,) tokens in each sample; None reads them off the samples.
            num_workers: DataLoader workers that read and collate.
            details: JSON-like notes for readers, kept in the scores' metadata.

        Raises:
            TypeError: not map-style, or samples that can't be fingerprinted.
            ValueError: an empty data set, a store that is none or of another format, targets
                that don't fit the loss.
            ScoreMismatchError: the store was made with another model, data set, loss or dtype.
        """
        _check_dataset(dataset)
        with preserved_rng():
            job = self._job(dataset, collate_fn, lengths, num_workers)
            identity = self._identity(job, dataset_id, collate_fn)
            if store is None:
                identity["model"] = self._model_identity()
                return _score(job, identity, dict(details or {}))
            with locked(Path(store)):
                identity["model"] = self._model_identity(fresh=True)
                return _score_into(Path(store), job, identity, dict(details or {}))

    def _job(self, dataset: Any, collate_fn: Collate | None, lengths: Any, num_workers: int) -> Job:
        collate = choose_collate(collate_fn, dataset[0])
        loss = self.loss
        if loss == "auto":
            loss = loss_of_model(innermost(self.model)) or loss_of_batch(
                collate([dataset[index] for index in range(min(_LOOKED_AT, len(dataset)))])
            )
        return Job(
            model=self.model,
            loss=loss,
            dtype=self._dtype(loss),
            device=self.device,
            reference=self.reference,
            token_losses=self.token_losses,
            compiled=self.compile is True,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            dataset=dataset,
            collate=collate,
            lengths=lengths,
            num_workers=num_workers,
            progress=self.progress,
            announce=self._announce,
        )

    def _identity(
        self, job: Job, dataset_id: str | None, collate_fn: Collate | None
    ) -> dict[str, Any]:
        """What losses depend on beside the model: equal identities, equal losses."""
        loss = job.loss
        return {
            "dataset": content_identity(job.dataset) if dataset_id is None else dataset_id,
            "num_samples": len(job.dataset),
            "loss": loss if isinstance(loss, str) else "callable:" + fingerprint_callable(loss),
            "reference": job.reference,
            "token_losses": job.token_losses,
            "collate_fn": fingerprint_callable(collate_fn),
            "dtype": name_of(job.dtype),
        }

    def _model_identity(self, *, fresh: bool = False) -> str:
        """The model's fingerprint; unless `fresh`, of when PyTorch last saw a tensor written.

        That spares streams, which score window after window, a pass over the parameters each.
        """
        tensors = [*self.model.parameters(), *self.model.buffers()]
        seen = [(tensor.data_ptr(), tensor._version) for tensor in tensors]
        if fresh or self._fingerprinted[0] != seen:
            base = self.reference == "base"
            self._fingerprinted = (seen, fingerprint_model(self.model, skip_adapters=base))
        return self._fingerprinted[1]

    def _dtype(self, loss: str | LossFunction) -> torch.dtype:
        if self.dtype == "auto" and loss not in LANGUAGE_LOSSES:
            floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
            return next(floating, torch.float32)
        return resolve_dtype(self.dtype, self.model, self.device)

    def _announce(self, sentence: str) -> None:
        self._explanation = sentence
        say(sentence, shown=self.progress)


def _score(job: Job, identity: dict[str, Any], details: dict[str, Any]) -> Scores:
    plan, options = make_plan(job, {})
    packs = dict(run_packs(job, plan, options, range(len(plan))))
    return merge_packs(plan, packs, make_manifest(identity, options, details))


def _score_into(
    folder: Path, job: Job, identity: dict[str, Any], details: dict[str, Any]
) -> Scores:
    """Take from a store what is there, and score and add what is not."""
    kept: Manifest | None = read_manifest(folder)
    if kept is not None:
        check_identity(kept["identity"], identity, folder)
        if is_finished(folder):
            job.announce(f"losses of {len(job.dataset):,} samples found in {folder}")
            return load_scores(folder)
    plan, options = make_plan(job, kept["plan"] if kept else {})
    if kept is None:
        kept = make_manifest(identity, options, details)
        write_manifest(folder, kept)
    check_identity(kept["plan"], options, folder)
    packs = dict(read_parts(folder, kept, plan.sizes))
    todo = [index for index in range(len(plan)) if index not in packs]
    writer = PartWriter(folder, kept, packs_per_part=max(1, len(plan) // _PARTS))
    try:
        for index, columns in run_packs(job, plan, options, todo):
            packs[index] = columns
            writer.add(index, columns)
        writer.flush()
    except BaseException:
        writer.flush()
        done = sum(len(columns["loss"]) for columns in packs.values())
        say(
            f"stopped with {done:,} of {len(job.dataset):,} samples kept in {folder}; "
            "the same call goes on from there",
            shown=job.progress,
        )
        raise
    scores = merge_packs(plan, packs, kept)
    finish(folder, scores)
    return scores


def _check_dataset(dataset: Any) -> None:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset must be map-style (with __len__ and __getitem__), got "
            f"{type(dataset).__name__}; for streams use FlowWeightedIterable"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to score")
