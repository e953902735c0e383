"""LossScorer: the loss of every sample under the frozen pre-trained model, once."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn

from flowdata._common.notices import say
from flowdata._common.rng import preserved_rng
from flowdata._common.unreadable import CollateReadable, Readable, check_map_style, first_readable
from flowdata.models.calling import innermost, unwrapped
from flowdata.models.placement import home, is_placed, usable_device
from flowdata.models.precision import name_of, resolve_dtype
from flowdata.scores import Scores
from flowdata.scoring.collate import Collate, check_stackable, choose_collate
from flowdata.scoring.job import Job, LossFunction
from flowdata.scoring.ranks import ranks_of_this_call
from flowdata.scoring.resume import ALIKE, score_into, score_packs
from flowdata.store.fingerprint import fingerprint_model
from flowdata.store.format import make_manifest
from flowdata.store.identity import check_identity, content_identity, scores_identity
from flowdata.targets.columns import check_columns
from flowdata.targets.which_loss import (
    LANGUAGE_LOSSES,
    LOSSES,
    PREDICTION_LOSSES,
    loss_of,
    loss_of_model,
)

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
        columns: what else to keep of every sample, in the same pass, among ``"entropy"``,
            ``"correct"`` and ``"gradient_norm"``: means over its targets of the predictive
            entropy, of whether the target was the likeliest class, and of the norm of the loss's
            gradient with respect to the last layer's weight. `Scores.weights` takes any of them
            in place of the loss.
        compile: ``True`` runs the model's layers through `torch.compile`, ``False`` doesn't,
            ``"auto"`` does where the job is long enough for it to pay.
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
        columns: Sequence[str] = (),
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
        if reference == "base" and any(getattr(m, "merged", False) for m in model.modules()):
            raise ValueError(
                "reference='base' turns adapters off, which would take merged ones out of the "
                "base model's weights; call model.unmerge_adapter() first"
            )
        if compile not in ("auto", True, False):
            raise ValueError(f"compile must be 'auto', True or False, got {compile!r}")
        if not isinstance(token_losses, bool):
            raise TypeError(f"token_losses must be True or False, got {token_losses!r}")
        _check_placed(model, dtype, device)
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
        self._says = progress
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
        on_error: Literal["raise", "skip"] = "raise",
        shared: bool = True,
        details: Mapping[str, Any] | None = None,
    ) -> Scores:
        """Return the losses of a data set, from the store where it has them.

        Inside a process group of `torch.distributed` all ranks make the same call, share the
        work and get the same scores. The losses are the same to the last bit for any number of
        ranks on like machines with the same number of threads.

        Args:
            dataset: map-style: `__len__` and `__getitem__`.
            collate_fn: list of samples -> batch, as a DataLoader takes it; None pads token
                samples and stacks others.
            store: folder in which losses are kept as they are made. The same call again returns
                them without running the model; after an interruption it goes on.
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
            ValueError: an empty data set, one that raises on a sample (its index named), a store
                that is none or of another format, targets that don't fit the loss.
            RankError: another rank failed.
            ScoreMismatchError: the store was made with another model, data set, loss or dtype.
        """
        ranks = ranks_of_this_call(shared=shared)
        with preserved_rng(), ranks.failing_together():
            _check_dataset(dataset)
            if not (collate_fn is None or callable(collate_fn)):
                raise TypeError(f"collate_fn must be callable or None, got {collate_fn!r}")
            if on_error not in ("raise", "skip"):
                raise ValueError(f"on_error must be 'raise' or 'skip', got {on_error!r}")
            skip = on_error == "skip"
            self._says = self.progress and ranks.is_first
            job = self._job(Readable(dataset, skip=skip), collate_fn, lengths, num_workers)
            if dataset_id is None:
                dataset_id = content_identity(dataset, skip_unreadable=skip)
            identity = self._identity(job, dataset_id, collate_fn, fresh=store is not None)
            manifest = make_manifest(identity, {}, details or {})
            for rank, (theirs, stored) in enumerate(
                ranks.gather("identity", [manifest["identity"], store is not None])
            ):
                check_identity(theirs, manifest["identity"], f"rank {rank}'s call", ALIKE)
                if stored != (store is not None):
                    raise ValueError(f"store must be given on all ranks or none, as rank {rank}")
            if store is None:
                scores = score_packs(job, manifest, ranks)
            else:
                scores = score_into(Path(store), job, manifest, ranks)
            ranks.leave()
        return scores

    def _job(self, dataset: Any, collate_fn: Collate | None, lengths: Any, num_workers: int) -> Job:
        first, loss = first_readable(dataset), self.loss
        if loss == "auto":
            loss = loss_of_model(innermost(self.model)) or loss
        if loss == "auto":
            few = [dataset[index] for index in range(min(_LOOKED_AT, len(dataset)))]
            collate = choose_collate(collate_fn, first, self.model)
            loss = loss_of(self.model, CollateReadable(collate)(few))
        collate = choose_collate(collate_fn, first, self.model, loss)
        if collate_fn is None and loss in PREDICTION_LOSSES:
            check_stackable(first)
        return Job(
            model=self.model,
            loss=loss,
            dtype=self._dtype(loss),
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
            progress=self._says,
            announce=self._announce,
        )

    def _identity(
        self, job: Job, dataset_id: str, collate_fn: Collate | None, *, fresh: bool
    ) -> dict[str, Any]:
        return scores_identity(
            model=self._model_identity(fresh=fresh),
            dataset=dataset_id,
            num_samples=len(job.dataset),
            loss=job.loss,
            reference=job.reference,
            token_losses=job.token_losses,
            columns=job.columns,
            collate_fn=collate_fn,
            dtype=name_of(job.dtype),
        )

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
        if self.dtype == "auto" and (loss not in LANGUAGE_LOSSES or is_placed(self.model)):
            floating = (p.dtype for p in self.model.parameters() if p.is_floating_point())
            return next(floating, torch.float32)
        return resolve_dtype(self.dtype, self.model, self.device)

    def _announce(self, sentence: str) -> None:
        self._explanation = sentence
        say(sentence, shown=self._says)


def _check_dataset(dataset: Any) -> None:
    check_map_style(dataset)
    if len(dataset) == 0:
        raise ValueError("dataset is empty: there is nothing to score")


def _check_placed(model: nn.Module, dtype: str | torch.dtype, device: object) -> None:
    if not is_placed(model):
        return
    own = {name_of(p.dtype) for p in model.parameters() if p.is_floating_point()}
    wanted = dtype if isinstance(dtype, str) else name_of(dtype)
    if device is not None or wanted not in ("auto", *own):
        raise ValueError(
            "a model that is sharded, or spread over devices, is scored as and where it is: leave "
            f"device=None, got {device!r}, and dtype='auto' (its own, {', '.join(sorted(own))}), "
            f"got {wanted!r}; to score in another dtype, load it in that"
        )
