"""Identity: what must agree for losses, or features, to be reused.

An identity is a mapping of JSON-like values. A store keeps it in its manifest, and a later call
reuses what the store holds if its own identity is equal, field for field. A field that is added,
or that is written in another way, therefore makes every earlier store unusable.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from flowdata._common.excerpts import excerpt_of
from flowdata.errors import ScoreMismatchError
from flowdata.store.fingerprint.callables import fingerprint_callable
from flowdata.store.fingerprint.dataset import fingerprint_dataset
from flowdata.store.fingerprint.model import fingerprint_model

CONTENT_PREFIX = "content:"  # of a data set's identity that was read off its samples
_CALLABLE_PREFIX = "callable:"  # of a loss that is the user's own function


def scores_identity(
    *,
    model: str,
    dataset: str,
    num_samples: int,
    loss: str | Callable[..., Any],
    reference: str,
    token_losses: bool,
    columns: Sequence[str],
    collate_fn: Callable[..., Any] | None,
    dtype: str,
) -> dict[str, Any]:
    """Return the identity of scores: equal identities mean equal losses.

    Args:
        model: the model's fingerprint; a scorer of streams keeps it from window to window.
        dataset: `content_identity`, or the user's own name for the content.
        num_samples: samples in the data set.
        loss: the loss's name, or the user's own function, of which the fingerprint is taken.
        reference: ``"model"`` or ``"base"``.
        token_losses: whether the loss of every target is kept.
        columns: the further columns that are kept.
        collate_fn: as the user gave it.
        dtype: the name of the dtype in which the model runs.
    """
    identity = {
        "dataset": dataset,
        "num_samples": num_samples,
        "loss": loss if isinstance(loss, str) else _CALLABLE_PREFIX + fingerprint_callable(loss),
        "reference": reference,
        "token_losses": token_losses,
        "collate_fn": fingerprint_callable(collate_fn),
        "dtype": dtype,
    }
    if columns:  # stores from before there were columns have no such field
        identity["columns"] = list(columns)
    return {**identity, "model": model}


def features_identity(
    *,
    body: nn.Module,
    dataset: Any,
    dataset_id: str | None,
    collate_fn: Callable[..., Any] | None,
    dtype: str,
) -> dict[str, Any]:
    """Return the identity of features: equal identities mean equal features.

    Args:
        body: the model that makes the features.
        dataset: map-style.
        dataset_id: names the data set's content; None fingerprints its samples.
        collate_fn: as the user gave it.
        dtype: the name of the dtype in which the body runs.
    """
    return {
        "kind": "features",
        "body": fingerprint_model(body),
        "dataset": content_identity(dataset) if dataset_id is None else dataset_id,
        "num_samples": len(dataset),
        "collate_fn": fingerprint_callable(collate_fn),
        "dtype": dtype,
    }


def content_identity(dataset: Any, *, skip_unreadable: bool = False) -> str:
    """Return a data set's identity as read off its samples (see `fingerprint_dataset`)."""
    return CONTENT_PREFIX + fingerprint_dataset(dataset, skip_unreadable=skip_unreadable)


def check_identity(
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    remedy: str = "Score into another folder, or delete this one if its losses are unwanted",
) -> None:
    """Raise ScoreMismatchError with what differs unless both identities are the same.

    Args:
        stored: the identity that `what` has.
        expected: the identity of this call.
        what: names the owner of `stored`, such as ``"the store scores/"``.
        remedy: a sentence on what the user can do.
    """
    names = [name for name in {**expected, **stored} if stored.get(name) != expected.get(name)]
    if names:
        differences = "; ".join(
            f"{name}: {what} has {excerpt_of(stored, name)}, this run {excerpt_of(expected, name)}"
            for name in names
        )
        raise ScoreMismatchError(
            f"{what} was made with another {' and '.join(names)} ({differences}). {remedy}"
        )
