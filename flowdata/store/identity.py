"""Identity: what must agree for losses, or features, to be reused.

An identity is a mapping of JSON-like values. A store keeps it in its manifest, and a later call
reuses what the store holds if its own identity is equal, field for field. A field that is added,
or that is written in another way, therefore makes every earlier store unusable.

The fingerprints of models and data sets carry the number of their scheme, which rises when they
come to hold more. Scheme 1, without a number, saw neither a model's lists, functions, hooks and
code nor a data set's transform and format: what it took for the same may have been another.

    model      2:<digest>
    dataset    content:2:<digest of the samples>[ <part>:<digest>…][ sampled:<n>/<N>]
               [ fields:<name>,<name>…]

The fields are the names that the model takes, where flowdata collates the samples itself: a column
by another name plays no part, whether it was there or is added later.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from torch import nn

from flowdata._common.excerpts import excerpt_of
from flowdata.errors import ScoreMismatchError
from flowdata.store.fingerprint.callables import fingerprint_callable
from flowdata.store.fingerprint.dataset import fingerprint_parts, sample_count
from flowdata.store.fingerprint.hugging_face import columns_given
from flowdata.store.fingerprint.model import fingerprint_model

CONTENT_PREFIX = "content:"  # of a data set's identity that was read off its samples
PART_PREFIX = "part "  # of the identity of a selection, which no data set has
_SCHEME = "2:"
_EARLIER = (
    "it was made by an earlier version of flowdata, whose fingerprints saw neither a model's "
    "functions, lists, hooks and code nor a data set's transform and format"
)
_PARTS = {  # of a data set's identity, as a message names them
    CONTENT_PREFIX[:-1]: "its samples differ in content or order, or another class gives them",
    "format": "the format differs (with_format, set_format)",
    "columns": "the columns that are shown differ (with_format, set_format)",
    "transform": "the transform differs (with_transform, set_transform)",
    "decoding": "the decoding of its features differs (Image, Audio)",
    "fields": "the fields that the model takes differ, or another collate_fn may read others",
}
_NAMES = {  # of an identity's fields, as a message names them, where its own name is no word
    "dataset": "data set",
    "num_samples": "number of samples",
    "columns": "set of columns",
    "token_losses": "choice of token_losses",
    "digest": "plan of packs",
}
_OTHERWISE = {  # what differs where digests do
    "model": "its weights, code or settings differ",
    "body": "its weights, code or settings differ",
    "dataset": "its samples differ in content or order",
    "loss": "the function differs, or a value that it uses",
    "collate_fn": "the function differs, or a value that it uses, or one of both had none",
}
_DIGEST = re.compile(r"\b([0-9a-f]{12})[0-9a-f]{4,}…?")
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
    return {**identity, "model": _SCHEME + model}


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
        "body": _SCHEME + fingerprint_model(body),
        "dataset": content_identity(dataset) if dataset_id is None else dataset_id,
        "num_samples": len(dataset),
        "collate_fn": fingerprint_callable(collate_fn),
        "dtype": dtype,
    }


def content_identity(
    dataset: Any, *, fields: Sequence[str] | None = None, skip_unreadable: bool = False
) -> str:
    """Return a data set's identity as read off its samples and view (`fingerprint_parts`).

    Args:
        dataset: map-style.
        fields: the names that the model takes, where it is given no other column; None where it
            may be given any.
        skip_unreadable: let a mark stand for a sample on which the data set raises.

    Raises:
        TypeError, SampleError: as `fingerprint_dataset`.
    """
    given = dataset if fields is None else columns_given(dataset, fields)
    parts = fingerprint_parts(given, skip_unreadable=skip_unreadable)
    words = [CONTENT_PREFIX + _SCHEME + parts.pop("samples")]
    words += [f"{name}:{digest}" for name, digest in parts.items()]
    number = sample_count(dataset)
    if number is not None:
        words.append(f"sampled:{number}/{len(dataset)}")
    if fields is not None:
        words.append(f"fields:{','.join(fields)}")
    return " ".join(words)


def is_model_identity(identity: str, fingerprint: str) -> bool:
    """Return whether the identity that a store tells is that of a model with this fingerprint."""
    return identity == _SCHEME + fingerprint


def fields_of(dataset_identity: str) -> list[str] | None:
    """Return the fields that decide on a data set's identity, None where any may.

    Example:
        >>> fields_of("content:2:ab12 fields:input_ids,labels")
        ['input_ids', 'labels']
    """
    fields = _words_of(dataset_identity).get("fields")
    return None if fields is None else fields.split(",")


def sampling_note(dataset_identity: str) -> str:
    """Return a sentence where a data set's identity rests on some of its samples, else ``""``.

    Example:
        >>> sampling_note("content:2:ab12 sampled:512/60000")
        'only 512 of the 60000 samples were fingerprinted, since code gives them'
        >>> sampling_note("content:2:ab12")
        ''
    """
    words = _words_of(dataset_identity)
    number, total = _reading(words)
    cause = "files hold them" if "decoding" in words else "code gives them"
    note = f"only {number} of the {total} samples were fingerprinted, since {cause}"
    return note if number else ""


def dataset_difference(stored: str, expected: str) -> str:
    """Return what differs between two identities of data sets, in words; ``""`` where nothing does.

    Args:
        stored: the identity of the data set that losses were made from.
        expected: that of the data set in hand.

    Example:
        >>> dataset_difference("content:2:ab", "content:2:ab transform:cd")
        'the transform differs (with_transform, set_transform)'
    """
    if stored == expected:
        return ""
    if not (stored.startswith(CONTENT_PREFIX) and expected.startswith(CONTENT_PREFIX)):
        return "another name was given for it"
    if _is_earlier(stored):
        return _EARLIER
    old, new = _words_of(stored), _words_of(expected)
    (number, total), (other, length) = (_reading(words) for words in (old, new))
    if number and number != other and length in (total, ""):
        return (
            f"{number} of {total} samples were fingerprinted there, and {other or 'all'} here, as "
            "where another class gives them, so that they can't be compared"
        )
    return ", ".join(words for part, words in _PARTS.items() if old.get(part) != new.get(part))


def _reading(words: Mapping[str, str]) -> tuple[str, str]:
    """How many samples an identity rests on, and of how many; "" where it rests on all."""
    number, _, total = words.get("sampled", "").partition("/")
    return number, total


def whole_fingerprint(identity: str) -> str:
    """Return the fingerprint of all samples of a data set, ``""`` where its identity has others."""
    words = _words_of(identity)
    is_whole = list(words) == [CONTENT_PREFIX[:-1]] and not _is_earlier(identity)
    return words[CONTENT_PREFIX[:-1]].removeprefix(_SCHEME) if is_whole else ""


def same_rows(stored: str, expected: str) -> bool:
    """Return whether two identities are of the same rows, whatever the view of them."""
    part = CONTENT_PREFIX[:-1]
    return _words_of(stored).get(part) == _words_of(expected).get(part)


def _words_of(identity: str) -> dict[str, str]:
    """The parts of a data set's identity; a name of the user's own has none."""
    words = identity.split(" ") if identity.startswith(CONTENT_PREFIX) else []
    return {name: digest for name, _, digest in (word.partition(":") for word in words)}


def _is_earlier(identity: Any) -> bool:
    text = str(identity).removeprefix(CONTENT_PREFIX)
    return not text.startswith(_SCHEME)


def check_identity(
    stored: Mapping[str, Any],
    expected: Mapping[str, Any],
    what: str,
    remedy: str = "Score into another folder, or delete this one if its losses are unwanted",
) -> None:
    """Raise ScoreMismatchError unless both identities are the same.

    The message says what differs in words, then what to do; fingerprints come last, shortened.

    Args:
        stored: the identity that `what` has.
        expected: the identity of this call.
        what: names the owner of `stored`, such as ``"the store scores/"``.
        remedy: a sentence on what the user can do.
    """
    names = [name for name in {**expected, **stored} if stored.get(name) != expected.get(name)]
    if not names:
        return
    words = [_NAMES.get(name, name) for name in names]
    texts = [field_difference(stored, expected, name, "there", "here") for name in names]
    if len(names) > 1:  # else the sentence has named the field
        texts = [f"{word}: {text}" for word, text in zip(words, texts, strict=True)]
    pairs = [(_short(stored, name), _short(expected, name)) for name in names]
    digests = "; ".join(
        f"{word} {old} there, {new} here"
        for name, word, (old, new) in zip(names, words, pairs, strict=True)
        if _has_digests(stored, expected, name) and old != new
    )
    raise ScoreMismatchError(
        f"{what} was made with another {' and '.join(words)}: {'; '.join(texts)}. {remedy}"
        f"{digests and f' (fingerprints: {digests})'}"
    )


def field_difference(
    stored: Mapping[str, Any], expected: Mapping[str, Any], name: str, first: str, second: str
) -> str:
    """Return how a field of two identities differs, in words; values where they are readable.

    Args:
        stored: one identity.
        expected: the other.
        name: of the field.
        first: names the owner of `stored`, or its place.
        second: that of `expected`.

    Example:
        >>> field_difference({"dtype": "float32"}, {"dtype": "bfloat16"}, "dtype", "there", "here")
        '"float32" there, "bfloat16" here'
    """
    if not _has_digests(stored, expected, name):
        return f"{_short(stored, name)} {first}, {_short(expected, name)} {second}"
    old, new = str(stored[name]), str(expected[name])
    if name in ("model", "body") and _is_earlier(old) and not _is_earlier(new):
        return _EARLIER
    is_content = old.startswith(CONTENT_PREFIX) and new.startswith(CONTENT_PREFIX)
    words = dataset_difference(old, new) if name == "dataset" and is_content else ""
    return words or _OTHERWISE.get(name, "its content differs")


def _has_digests(stored: Mapping[str, Any], expected: Mapping[str, Any], name: str) -> bool:
    """Whether both values hold digests, which tell a reader nothing but that they differ."""
    return all(_DIGEST.search(str(each.get(name, ""))) for each in (stored, expected))


def _short(identity: Mapping[str, Any], name: str) -> str:
    """A field's value; of a digest the beginning."""
    return _DIGEST.sub(r"\1…", excerpt_of(identity, name))
