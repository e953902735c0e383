"""LossScorer: the loss of every sample under the frozen pre-trained model, once."""

from __future__ import annotations

from collections.abc import Hashable, Mapping, Sequence
from typing import Any, Literal, Protocol

import torch
from torch import Tensor, nn

from flowdata._common.notices import is_first_time, say
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import CollateReadable, Readable, first_readable
from flowdata.errors import DisagreementError
from flowdata.models.batch_norm import check_batch_norm
from flowdata.models.calling import unwrapped
from flowdata.models.copies import frozen_model
from flowdata.models.placement import home, usable_device
from flowdata.models.precision import name_of, resolve_dtype
from flowdata.scores import Scores
from flowdata.scoring.arguments import (
    check_call,
    check_counts,
    check_loss,
    check_placed,
    check_reference,
    check_switches,
    check_token_losses,
)
from flowdata.scoring.collate import Collate, check_stackable, choose_collate, fields_given
from flowdata.scoring.job import Job, LossFunction
from flowdata.scoring.kinds import kind_of
from flowdata.scoring.lend import adapters_of
from flowdata.scoring.meaning import decide_loss
from flowdata.scoring.planning import check_same_call
from flowdata.scoring.ranks import ranks_of_this_call
from flowdata.scoring.resume import score_in_memory, score_into_store
from flowdata.store.fingerprint import fingerprint_model
from flowdata.store.folder import read_manifest
from flowdata.store.format import make_manifest
from flowdata.store.identity import (
    content_identity,
    is_model_identity,
    sampling_note,
    scores_identity,
)
from flowdata.store.places import Place, place_of
from flowdata.store.random_samples import remark_on_random_samples
from flowdata.targets.columns import check_columns
from flowdata.targets.which_loss import (
    LANGUAGE_LOSSES,
    LOSSES,
    PREDICTION_LOSSES,
    has_known_loss,
    loss_of_model,
)


class Scorer(Protocol):
    """What scores a data set: a `LossScorer`, or anything with its `score`."""

    def score(self, dataset: Any, **options: Any) -> Scores:
        """Return the loss of every sample; NaN where there is none."""


class LossScorer:
    """Scores data sets: each sample's loss under a frozen pre-trained model.

    Source: f_i(θ*) of Sanyal et al., ICML 2025, arXiv:2502.02797. The loss of a sample is the
    mean over its targets, in float32; targets of language models are the labels other than −100.

    Args:
        model: the pre-trained model. It comes back exactly as it went in: training flags, dtype,
            device, gradients, hooks; the global random generators too.
        loss: ``"causal_lm"``, ``"seq2seq_lm"``, ``"masked_lm"``, ``"cross_entropy"``,
            ``"binary_cross_entropy"``, ``"mse"``, ``"own"`` (what the model itself returns as its
            loss, one sample at a time), or a callable ``(model, batch) -> (B,)`` tensor of losses,
            or ``(outputs, batch) -> (B,)`` by that name of its first argument;
            ``"auto"`` takes the name that equals the model's own loss, and says what it chose. A
            loss by another name is refused.
        dtype: ``"auto"`` is bfloat16 for language models where the device is fast at it, else
            the model's own: a classifier's loss rests on one target, whose rounding errors
            nothing averages out. Or ``"float32"``, ``"bfloat16"``, ``"float16"``.
        device: where to score; None is where the model is.
        max_tokens: tokens in one pack, padding included; None chooses by device.
        batch_size: most samples in one pack; None leaves that to `max_tokens`, or chooses by
            device for samples without a length.
        reference: ``"base"`` scores a PEFT model with its adapters off.
        token_losses: keep the loss of every target as well.
        columns: what else to keep of every sample, in the same pass, among ``"entropy"``,
            ``"correct"`` and ``"gradient_norm"``: means over its targets of the predictive
            entropy, of whether the target was the likeliest class, and of the norm of the loss's
            gradient with respect to the last layer's weight. `Scores.weights` takes any of them
            in place of the loss.
        compile: ``True`` runs the model's layers through `torch.compile`, ``False`` doesn't,
            ``"auto"`` does in long jobs on devices where it was measured to pay.
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
        >>> print(scorer.explain())  # doctest: +ELLIPSIS
        cross_entropy in float32 on cpu; 1 pack of at most 64 samples; ...6 samples checked ...
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
        columns: Sequence[str] = (),
        compile: Literal["auto"] | bool = "auto",
        progress: bool = True,
    ) -> None:
        if not isinstance(model, nn.Module):
            raise TypeError(
                f"model must be a torch.nn.Module, got {type(model).__name__}; load it first"
            )
        model = unwrapped(model)
        check_loss(loss)
        check_counts(max_tokens=max_tokens, batch_size=batch_size)
        check_reference(reference, model)
        check_switches(compile, token_losses)
        check_token_losses(token_losses, loss)
        check_placed(model, dtype, device)
        self.model: nn.Module = model
        self.loss = loss
        self.device = home(model) if device is None else usable_device(device)
        resolve_dtype(dtype, model, self.device)  # refuses a wrong one now
        self.dtype = dtype
        self.max_tokens = max_tokens
        self.batch_size = batch_size
        self.reference = reference
        self.token_losses = token_losses
        self.columns = check_columns(columns, loss)
        self.compile = compile
        self.progress = progress
        self._is_shown = progress
        self._explanation = "nothing scored yet"
        self._dataset_id = ""
        self._losses_of_kinds: dict[Hashable, str] = {}
        self._suspects: tuple[int, ...] = ()
        self.is_for_windows = False  # of a stream, which reads their losses alone

    def explain(self) -> str:
        """Return a sentence on the last `score`: what was chosen and why."""
        return self._explanation

    def score(
        self,
        dataset: Any,
        *,
        collate_fn: Collate | None = None,
        store: str | Place | None = None,
        dataset_id: str | None = None,
        lengths: Sequence[int] | Tensor | None = None,
        num_workers: int = 0,
        on_error: Literal["raise", "skip"] = "raise",
        shared: bool = True,
        details: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Return the losses of a data set, from the store where it has them.

        Inside a process group of `torch.distributed` all ranks make the same call, share the
        work and get the same scores. The losses are the same to the last bit for any number of
        ranks on like machines with the same number of threads. On a CPU a new run takes the number
        that ``OMP_NUM_THREADS`` sets, else the one that is fastest there at that time, at most
        PyTorch's own. A run that goes on keeps the number that its store was begun with, whatever
        is set by then; another number takes another store.

        Args:
            dataset: map-style: `__len__` and `__getitem__`.
            collate_fn: list of samples -> batch, as a DataLoader takes it; None pads token
                samples and stacks others. Packed documents, whose `position_ids` begin again, then
                don't see each other where samples have no `attention_mask`. So Trainer trains on
                them, which sets `use_cache=False`, unless its collator adds a mask of ones, as
                DataCollatorWithPadding does.
            store: folder, or URL (s3://, gs://, hf://buckets/), where losses are kept as they are
                made. The same call returns them without running the model, or goes on.
            dataset_id: names the data set's content; None fingerprints its samples: all of lists,
                tensors and Hugging Face data sets, 512 of a larger one that only code can read.
            lengths: (N,) tokens in each sample; None reads them off the samples.
            num_workers: DataLoader workers that read and collate.
            on_error: ``"skip"`` leaves samples that the data set raises on without a loss, and
                keeps the reasons in the scores' metadata, `skipped`.
            shared: False scores on this rank alone, whatever the others do.
            details: JSON-like notes for readers, kept in the scores' metadata.

        Raises:
            TypeError: not map-style, or samples that can't be fingerprinted.
            ValueError: the data set is empty, or raises on a sample (its index named); the store
                keeps samples that an earlier call skipped, is no store, or is of another format;
                targets don't fit the loss.
            RankError: another rank failed.
            ScoreMismatchError: the store was made with another model, data set, loss or dtype.
        """
        ranks = ranks_of_this_call(shared=shared)
        with preserved_rng(), ranks.failing_together():
            check_call(dataset, collate_fn, on_error)
            skip = on_error == "skip"
            place = None if store is None else place_of(store)
            self._is_shown = self.progress and ranks.is_first
            readable = Readable(dataset, skip=skip)
            job = self._job(readable, collate_fn, lengths, num_workers, place)
            remark_on_random_samples(dataset, dataset_id, skip_unreadable=skip)
            if dataset_id is None:
                fields = fields_given(self.model, dataset, collate_fn, job.loss)
                dataset_id = content_identity(dataset, fields=fields, skip_unreadable=skip)
            self._dataset_id = dataset_id
            identity = self._identity(job, dataset_id, collate_fn)
            draft = make_manifest(identity, {}, details or {})
            check_same_call(ranks, draft["identity"], has_store=store is not None)
            try:
                if place is None:
                    scores = score_in_memory(job, draft, ranks)
                else:
                    scores = score_into_store(place, job, draft, ranks)
            except DisagreementError as error:
                self._suspects = (*self._suspects, error.sample)
                raise
            ranks.leave()
        return scores

    def _job(
        self,
        dataset: Any,
        collate_fn: Collate | None,
        lengths: Any,
        num_workers: int,
        store: Place | None = None,
    ) -> Job:
        check_batch_norm(self.model)
        first = first_readable(dataset)
        loss = self._choose_loss(dataset, first, collate_fn, store)
        collate = choose_collate(collate_fn, first, self.model, loss)
        if collate_fn is None and loss in PREDICTION_LOSSES:
            check_stackable(first)
        check_token_losses(self.token_losses, loss)
        one_target = loss not in LANGUAGE_LOSSES
        return Job(
            model=self.model,
            loss=loss,
            dtype=resolve_dtype(self.dtype, self.model, self.device, one_target=one_target),
            device=self.device,
            reference=self.reference,
            token_losses=self.token_losses,
            columns=check_columns(self.columns, loss),
            compile=self.compile,
            max_tokens=self.max_tokens,
            batch_size=self.batch_size,
            dataset=dataset,
            collate=CollateReadable(collate),
            lengths=lengths,
            num_workers=num_workers,
            progress=self._is_shown,
            announce=self._announce,
            suspects=tuple(index for index in self._suspects if index < len(dataset)),
        )

    def _choose_loss(
        self,
        dataset: Any,
        first: Any,
        collate_fn: Collate | None,
        store: Place | None,
    ) -> str | LossFunction:
        """The loss that the user named; for "auto" that which equals the model's own.

        What was decided holds for samples with the same fields in all windows of a stream; and what
        a store of this very model says was decided once.
        """
        if self.loss != "auto":
            return self.loss
        if collate_fn is None:
            check_stackable(first)
        begun = None if store is None else read_manifest(store)
        if begun is not None:
            model, loss = (str(begun["identity"].get(name)) for name in ("model", "loss"))
            if loss in LOSSES and is_model_identity(model, self._model_identity()):
                return loss
        if not self.is_for_windows:
            return self._decide_loss(dataset, first, collate_fn)
        kind = kind_of(first)
        if kind not in self._losses_of_kinds:
            self._losses_of_kinds[kind] = self._decide_loss(dataset, first, collate_fn)
        return self._losses_of_kinds[kind]

    def _decide_loss(self, dataset: Any, first: Any, collate_fn: Collate | None) -> str:
        loss_of_class = loss_of_model(self.model)
        collate = choose_collate(collate_fn, first, self.model, loss_of_class)
        place = home(self.model)
        dtype = resolve_dtype("auto", self.model, place, one_target=True)  # the model's own
        with (
            frozen_model(self.model, dtype, place) as model,
            adapters_of(self.reference, model),
        ):
            is_known = has_known_loss(self.model)
            return decide_loss(model, dataset, collate, place, is_known=is_known)

    def _identity(self, job: Job, dataset_id: str, collate_fn: Collate | None) -> dict[str, Any]:
        return scores_identity(
            model=self._model_identity(),
            dataset=dataset_id,
            num_samples=len(job.dataset),
            loss=job.loss,
            reference=job.reference,
            token_losses=job.token_losses,
            columns=job.columns,
            collate_fn=collate_fn,
            dtype=name_of(job.dtype),
        )

    def _model_identity(self) -> str:
        """The fingerprint of the model as it is now; ``""`` for the windows of a stream.

        It is taken afresh by every call: nothing counts plain settings, the adapters that are on
        or writes through `tensor.data`. Windows are spared the pass over all parameters.
        """
        if self.is_for_windows:
            return ""
        return fingerprint_model(self.model, skip_adapters=self.reference == "base")

    def _announce(self, sentence: str) -> None:
        note = sampling_note(self._dataset_id)
        self._explanation = "; ".join(filter(None, [sentence, note]))
        is_told = bool(note) and self._is_shown and not is_first_time(self._dataset_id)
        say(sentence if is_told else self._explanation, shown=self._is_shown)
