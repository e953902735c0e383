"""LossScorer: the loss of every sample under the frozen pre-trained model, once."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata.fingerprint import fingerprint_callable, fingerprint_model
from flowdata.progress import progress_bar, say
from flowdata.rng import preserved_rng
from flowdata.scores import Scores, content_identity
from flowdata.scoring.batches import Collate, choose_collate, sample_lengths
from flowdata.scoring.language import agrees, methods
from flowdata.scoring.plan import Plan, plan_fixed, plan_padded
from flowdata.scoring.precision import map_tensors, name_of, resolve_dtype, scoring_model
from flowdata.scoring.tasks import (
    LANGUAGE_LOSSES,
    LOSSES,
    Method,
    callable_method,
    innermost,
    loss_of_batch,
    loss_of_model,
    prediction_method,
    unwrapped,
)
from flowdata.store import (
    Manifest,
    PartWriter,
    check_identity,
    finish,
    load_scores,
    locked,
    make_manifest,
    read_manifest,
    read_parts,
    write_manifest,
)

logger = logging.getLogger("flowdata")

_MAX_TOKENS = {"cpu": 4096, "cuda": 32768}
_BATCH_SIZE = {"cpu": 64, "cuda": 256}
_PARTS = 200  # at most about so many parts, whatever the number of packs
_LOOKED_AT = 64  # samples from which loss="auto" tells the kind of targets
_CHECKED_SAMPLES = 2  # on which a fast way is compared with the plain one

LossFunction = Callable[[nn.Module, Any], Tensor]


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
        dtype: ``"auto"`` is bfloat16 where the device is fast at it and the loss a named one,
            else the model's own; or ``"float32"``, ``"bfloat16"``, ``"float16"``.
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
        self.model: nn.Module = model
        self.loss = loss
        own = next(iter([*model.parameters(), *model.buffers()]), torch.empty(0))
        self.device = own.device if device is None else torch.device(device)
        if callable(loss) and dtype == "auto":  # its code was written for the model as it is
            dtype = own.dtype if own.is_floating_point() else torch.float32
        self.dtype = resolve_dtype(dtype, model, self.device)
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.reference = reference
        self.token_losses = token_losses
        self.compile = compile
        self.progress = progress
        self._explanation = "nothing scored yet"

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
            collate = choose_collate(collate_fn, dataset[0])
            loss = self.loss
            if loss == "auto":
                loss = loss_of_model(innermost(self.model)) or loss_of_batch(
                    collate([dataset[i] for i in range(min(_LOOKED_AT, len(dataset)))])
                )
            run = _Run(self, dataset, collate, loss, lengths, num_workers, dict(details or {}))
            if store is None:
                return run.fresh(self._identity(dataset, dataset_id, collate_fn, loss))
            with locked(Path(store)):
                manifest = read_manifest(Path(store))  # before the fingerprints: it may refuse
                identity = self._identity(dataset, dataset_id, collate_fn, loss)
                return run.stored(Path(store), manifest, identity)

    def _identity(
        self,
        dataset: Any,
        dataset_id: str | None,
        collate_fn: Collate | None,
        loss: str | LossFunction,
    ) -> dict[str, Any]:
        """What losses depend on: equal identities, equal losses."""
        return {
            "model": fingerprint_model(self.model, skip_adapters=self.reference == "base"),
            "dataset": content_identity(dataset) if dataset_id is None else dataset_id,
            "num_samples": len(dataset),
            "loss": loss if isinstance(loss, str) else "callable:" + fingerprint_callable(loss),
            "reference": self.reference,
            "token_losses": self.token_losses,
            "collate_fn": fingerprint_callable(collate_fn),
            "dtype": name_of(self.dtype),
        }


class _Run:
    """One call of `LossScorer.score`."""

    def __init__(
        self,
        scorer: LossScorer,
        dataset: Any,
        collate: Collate,
        loss: str | LossFunction,
        lengths: Any,
        num_workers: int,
        details: dict[str, Any],
    ) -> None:
        self.scorer, self.dataset, self.collate = scorer, dataset, collate
        self.loss, self.lengths, self.num_workers = loss, lengths, num_workers
        self.details = details

    def fresh(self, identity: dict[str, Any]) -> Scores:
        """Score without a store."""
        plan, options = self.plan(None)
        columns = dict(self.packs(plan, range(len(plan))))
        return self.merge(plan, columns, make_manifest(identity, options, self.details))

    def stored(self, folder: Path, kept: Manifest | None, identity: dict[str, Any]) -> Scores:
        """Score into a store, or take from it what is there."""
        if kept is not None:
            check_identity(kept["identity"], identity, folder)
            if (folder / "scores.safetensors").exists():
                self.explain(f"losses of {len(self.dataset):,} samples found in {folder}")
                return load_scores(folder)
        plan, options = self.plan(kept)
        manifest = kept or make_manifest(identity, options, self.details)
        check_identity(kept["plan"] if kept else options, options, folder)
        if kept is None:
            write_manifest(folder, manifest)
        columns = dict(read_parts(folder, manifest, plan.sizes))
        todo = [index for index in range(len(plan)) if index not in columns]
        writer = PartWriter(folder, manifest, packs_per_part=max(1, len(plan) // _PARTS))
        try:
            for index, pack in self.packs(plan, todo):
                columns[index] = pack
                writer.add(index, pack)
        except BaseException:
            writer.flush()
            done = sum(len(pack["loss"]) for pack in columns.values())
            say(
                f"stopped with {done:,} of {len(self.dataset):,} samples kept in {folder}; "
                "the same call goes on from there",
                shown=self.scorer.progress,
            )
            raise
        writer.flush()
        scores = self.merge(plan, columns, manifest)
        finish(folder, scores)
        return scores

    def plan(self, kept: Manifest | None) -> tuple[Plan, dict[str, Any]]:
        """The plan, with a begun store's options before the scorer's, and its description."""
        options = dict(kept["plan"]) if kept else {}
        device = "cuda" if self.scorer.device.type == "cuda" else "cpu"
        lengths = sample_lengths(self.dataset, self.lengths)
        batch_size = options.get("batch_size", self.scorer.batch_size)
        max_tokens = options.get("max_tokens", self.scorer.max_tokens)
        if lengths is None:
            max_tokens, batch_size = None, batch_size or _BATCH_SIZE[device]
            plan = plan_fixed(len(self.dataset), batch_size=batch_size)
        else:
            max_tokens = max_tokens or _MAX_TOKENS[device]
            plan = plan_padded(lengths, max_tokens=max_tokens, batch_size=batch_size)
        self.cut = f"{len(plan):,} pack{'s' * (len(plan) != 1)} of at most " + (
            f"{batch_size} samples" if max_tokens is None else f"{max_tokens:,} tokens"
        )
        described = {"max_tokens": max_tokens, "batch_size": batch_size, "packs": len(plan)}
        return plan, described | {"digest": plan.digest}

    def packs(self, plan: Plan, todo: Sequence[int]) -> Iterator[tuple[int, dict[str, Tensor]]]:
        """Run packs and yield each one's number and columns."""
        if not todo:
            return
        scorer = self.scorer
        batches = DataLoader(
            self.dataset,
            batch_sampler=[plan.pack(index).tolist() for index in todo],
            collate_fn=self.collate,
            num_workers=self.num_workers,
            generator=torch.Generator().manual_seed(0),
        )
        total, left = int(plan.costs.sum()), int(plan.costs[list(todo)].sum())
        unit = "tokens" if "tokens" in self.cut else "samples"
        with (
            scoring_model(scorer.model, scorer.dtype, scorer.device) as model,
            _adapters_off(model) if scorer.reference == "base" else nullcontext(),
            _compiled(model, scorer.compile is True),
            progress_bar(total, "scoring", unit, done=total - left, shown=scorer.progress) as bar,
        ):
            method, name = self.method(model)
            self.explain(self.sentence(name))
            for index, batch in zip(todo, batches, strict=True):
                targets = method(model, self.on_device(batch))
                columns = targets.columns(token_losses=scorer.token_losses)
                self.check_pack(columns, plan.pack(index))
                yield index, columns
                bar(int(plan.costs[index]))

    def method(self, model: nn.Module) -> tuple[Method, str]:
        """The fastest way to the losses that agrees with the plainest, and its name."""
        if not isinstance(self.loss, str):
            return callable_method(self.loss), ""
        if self.loss not in LANGUAGE_LOSSES:
            return prediction_method(self.loss), ""
        *ways, (plainest, plain) = methods(model, self.loss)
        count = min(_CHECKED_SAMPLES, len(self.dataset))
        batch = self.on_device(self.collate([self.dataset[index] for index in range(count)]))
        for name, method in ways:
            reason = agrees(method, plain, model, batch, self.scorer.dtype)
            if not reason:
                return method, name
            logger.warning("not scoring by %s: %s", name, reason)
        return plain, plainest

    def merge(
        self, plan: Plan, columns: dict[int, dict[str, Tensor]], manifest: Manifest
    ) -> Scores:
        """Put the packs' columns into data set order."""
        merged = {
            name: torch.cat([columns[index][name] for index in range(len(plan))])
            for name in columns[0]
        }
        losses, counts = torch.empty(len(self.dataset)), torch.empty(len(self.dataset)).long()
        losses[plan.order], counts[plan.order] = merged["loss"], merged["count"]
        token_losses = merged.get("token_loss")
        if token_losses is not None:
            samples = token_losses.split(merged["count"].tolist())
            token_losses = torch.cat([samples[i] for i in plan.order.argsort().tolist()])
        scores = Scores(losses, counts, metadata=manifest, token_losses=token_losses)
        self.report_missing(scores)
        return scores

    def report_missing(self, scores: Scores) -> None:
        """Say how many samples have no loss."""
        missing = scores.losses.isnan()
        if missing.any():
            logger.warning(
                "%d of %d samples have no loss: %d without a target, %d with a non-finite loss; "
                "the first is sample %d. weights(missing='zero') gives them weight 0",
                int(missing.sum()),
                len(scores),
                int((scores.counts == 0).sum()),
                int((missing & (scores.counts > 0)).sum()),
                int(missing.int().argmax()),
            )

    def check_pack(self, columns: dict[str, Tensor], samples: Tensor) -> None:
        """Refuse losses that can't be matched to samples."""
        if len(columns["loss"]) != len(samples):
            raise ValueError(
                f"a batch of {len(samples)} samples gave {len(columns['loss'])} losses; collate_fn "
                "and loss must keep one entry for each sample, in order"
            )

    def on_device(self, batch: Any) -> Any:
        return map_tensors(batch, lambda t: t.to(self.scorer.device, non_blocking=True))

    def sentence(self, method: str) -> str:
        name = self.loss if isinstance(self.loss, str) else "the given callable"
        where = f"{name} in {name_of(self.scorer.dtype)} on {self.scorer.device}"
        return "; ".join(filter(None, [where, method, self.cut]))

    def explain(self, sentence: str) -> None:
        self.scorer._explanation = sentence
        say(sentence, shown=self.scorer.progress)


def _adapters_off(model: Any) -> AbstractContextManager[None]:
    off: AbstractContextManager[None] = model.disable_adapter()
    return off


@contextmanager
def _compiled(model: Any, wanted: bool) -> Iterator[None]:
    """Compile a module's call for a block."""
    if wanted:
        model.compile(dynamic=True)
    try:
        yield
    finally:
        if wanted:
            model._compiled_call_impl = None


def _check_dataset(dataset: Any) -> None:
    if not hasattr(dataset, "__getitem__") or not hasattr(dataset, "__len__"):
        raise TypeError(
            f"dataset must be map-style (with __len__ and __getitem__), got "
            f"{type(dataset).__name__}; for streams use FlowWeightedIterable"
        )
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to score")
