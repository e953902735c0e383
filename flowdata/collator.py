"""Weights through any collator: taken off the samples before it, put on the batch after."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor

from flowdata._common.rng import preserved_rng
from flowdata.scoring.grouping import shapes_of

_BATCHES_TO_LOOK_AT = 32  # for one whose samples differ in shape


class WeightedCollator:
    """A collator whose batches keep the weights of their samples.

    It takes samples of every layout of `FlowWeightedDataset`: pairs become (batch, weights),
    triples (inputs, targets, weights), and mappings a mapping with `key`. The weights are (B,)
    float32; the frozen model's outputs, where samples have them, come last. A mapping may hold one
    weight for each token instead, (T,): these are padded or joined just as the collator padded or
    joined `input_ids`. Where it joined all samples into one row, each sample's weight goes to all
    of its tokens, (1, ΣT).

    Args:
        collate_fn: the collator of the samples without weights, such as a Hugging Face one.
        key: the weight's name in samples that are mappings.

    Raises (when called):
        ValueError: only some samples have a weight, or one that is none (negative, not finite);
            token weights can't be laid along the batch's `input_ids`; or the collator puts samples
            in another order, as sorting by length does, told by the first batch and by the first
            of 32 whose samples differ in length or shape.

    Example:
        >>> import torch
        >>> from torch.nn.utils.rnn import pad_sequence
        >>> collate = WeightedCollator(pad_sequence)
        >>> first, second = torch.tensor([1, 2]), torch.tensor([3])
        >>> batch, weights = collate([(first, torch.tensor(0.5)), (second, torch.tensor(1.0))])
        >>> batch.shape, weights
        (torch.Size([2, 2]), tensor([0.5000, 1.0000]))
    """

    def __init__(self, collate_fn: Callable[[list[Any]], Any], key: str = "weight") -> None:
        self.collate_fn, self.key = collate_fn, key
        self._looks = _BATCHES_TO_LOOK_AT  # at batches, that are left

    def __call__(self, samples: Sequence[Any]) -> Any:
        """Return the collated batch with its weights, or without any if no sample has one."""
        first = samples[0]
        if isinstance(first, Mapping):
            return self._collate_mappings(samples)
        # What the frozen model makes of a sample stands behind its weight.
        if isinstance(first, tuple) and len(first) in (3, 4) and _is_reference(*first[-2:]):
            references = torch.stack([sample[-1] for sample in samples])
            batch = self([sample[:-1] for sample in samples])
            return (*batch, references)
        # A label may be a 0-d tensor, too, but an integer one: only a floating one is a weight.
        if isinstance(first, tuple | list) and len(first) in (2, 3) and _is_weight(first[-1]):
            weights = torch.stack(_weights_of([sample[-1] for sample in samples]))
            if len(first) == 2:
                return self._collate([sample[0] for sample in samples]), weights
            return (*self._collate([tuple(sample[:2]) for sample in samples]), weights)
        return self.collate_fn(list(samples))

    def _collate(self, samples: list[Any]) -> Any:
        """Collate samples without weights, and look whether their rows come in their order.

        Sorting by length leaves samples of one length in their order, so that the first batch may
        not tell. To look makes a batch once more; two of them are, at most.
        """
        if len(samples) < 2 or self._looks == 0:
            return self.collate_fn(samples)
        is_first, self._looks = self._looks == _BATCHES_TO_LOOK_AT, self._looks - 1
        if any(shapes_of(sample) != shapes_of(samples[0]) for sample in samples[1:]):
            self._looks = 0
        elif not is_first:
            return self.collate_fn(samples)
        originals = _copies(samples)
        batch = self.collate_fn(samples)
        self._check_order(_rows(batch, len(samples)), originals)
        return batch

    def _check_order(self, rows: list[bytes], samples: list[Any]) -> None:
        """Refuse a collator that makes the same rows of samples whatever the samples' order.

        One that draws at random makes other rows, which tell nothing.
        """
        if len(rows) != len(samples) or len(set(rows)) < 2:
            return
        with preserved_rng():
            backwards = _rows(self.collate_fn(_copies(samples[::-1])), len(samples))
            if backwards[::-1] == rows or sorted(backwards) != sorted(rows):
                return
            # Rows may be the places of sequences instead of samples, (T, B).
            same = _rows(self.collate_fn(_copies(samples[:1] * len(samples))), len(samples))
            is_of_samples = len(set(same)) == 1
        if is_of_samples:
            raise ValueError(
                "the collator puts the samples of a batch in another order, as sorting by length "
                "does, so that weights would go to other samples; sort in the data set or the "
                "sampler, or let the collator keep the order it is given"
            )

    def _collate_mappings(self, samples: Sequence[Mapping[str, Any]]) -> Any:
        has_weight = [self.key in sample for sample in samples]
        if not any(has_weight):
            return self.collate_fn(list(samples))
        if not all(has_weight):
            raise ValueError(
                f"sample {has_weight.index(False)} of the batch has no {self.key!r}, others do; "
                "weigh all of the data set's samples"
            )
        unweighted = [{k: v for k, v in sample.items() if k != self.key} for sample in samples]
        batch = self._collate(unweighted)
        weights = _weights_of([sample[self.key] for sample in samples])
        if weights[0].dim() == 0 and not _is_joined(batch, len(samples)):
            return {**batch, self.key: torch.stack(weights)}
        tokens = [torch.as_tensor(sample["input_ids"]) for sample in samples]
        if weights[0].dim() == 0:
            weights = [weight.expand(len(ids)) for weight, ids in zip(weights, tokens, strict=True)]
        along = lay_along(weights, tokens, batch["input_ids"], batch.get("attention_mask"))
        return {**batch, self.key: along}


def lay_along(
    weights: Sequence[Tensor], tokens: Sequence[Tensor], batch: Tensor, mask: Any = None
) -> Tensor:
    """Return token weights where a collator put the tokens, 0 on padding: the shape of `batch`.

    Args:
        weights: for each sample (T,) floating, one for each of its tokens.
        tokens: the samples' `input_ids`, (T,).
        batch: the collated `input_ids`: (B, T) padded on either side, or (1, ΣT) joined.
        mask: the batch's `attention_mask`, which tells the side where tokens don't: one of the
            batch's shape; others are not looked at.

    Raises:
        ValueError: a sample has more weights than tokens or fewer, or its tokens are not in the
            batch as they were.

    Example:
        >>> import torch
        >>> tokens = [torch.tensor([7, 8]), torch.tensor([9])]
        >>> weights = [torch.tensor([0.1, 0.2]), torch.tensor([0.3])]
        >>> lay_along(weights, tokens, torch.tensor([[7, 8], [0, 9]]))
        tensor([[0.1000, 0.2000],
                [0.0000, 0.3000]])
    """
    for number, (weight, ids) in enumerate(zip(weights, tokens, strict=True)):
        if weight.shape != ids.shape:
            raise ValueError(
                f"sample {number} of the batch has {len(weight)} token weights for {len(ids)} "
                "tokens; cut both together (flowdata.token_weights.align_token_weights)"
            )
    if len(batch) == 1 and len(tokens) > 1:
        # A single row of several samples is a joined one: it is looked at as one long sample.
        weights, tokens = [torch.cat(list(weights))], [torch.cat(list(tokens))]
    token_weights = torch.zeros(batch.shape, dtype=torch.float32)
    for row, start, weight in zip(
        token_weights, _starts(tokens, batch, mask), weights, strict=True
    ):
        row[start : start + len(weight)] = weight
    return token_weights


def _starts(tokens: Sequence[Tensor], batch: Tensor, mask: Any) -> list[int]:
    """Where each sample's tokens begin in its row of the batch.

    A collator does not say on which side it padded, so the tokens are looked for at both ends. A
    sample of padding tokens is found at either: it lies where the others do, or, where these are
    found at either end as well, where the mask is set.
    """
    sides = [[0] * len(tokens), [batch.shape[1] - len(ids) for ids in tokens]]
    fits = [
        [start >= 0 and torch.equal(row[start : start + len(ids)], ids) for start, row, ids in rows]
        for rows in (zip(starts, batch, tokens, strict=True) for starts in sides)
    ]
    for number, fits_at in enumerate(zip(*fits, strict=True)):
        if not any(fits_at):
            raise ValueError(
                f"the collator changed the tokens of sample {number} of the batch, so its token "
                "weights can't follow; truncate and mask in the data set, not in the collator"
            )
    is_mask = isinstance(mask, Tensor) and mask.shape == batch.shape

    def found(side: int) -> tuple[int, int]:
        rows = zip(sides[side], mask, tokens, strict=True) if is_mask else ()
        masked = (int((row[start : start + len(ids)] != 0).sum()) for start, row, ids in rows)
        return sum(fits[side]), sum(masked)

    first, second = sorted((0, 1), key=found, reverse=True)
    return [
        sides[first][number] if fits[first][number] else sides[second][number]
        for number in range(len(tokens))
    ]


def _is_joined(batch: Mapping[str, Any], size: int) -> bool:
    """Return whether a batch of several samples is one row of tokens."""
    ids = batch.get("input_ids")
    return size > 1 and isinstance(ids, Tensor) and ids.dim() == 2 and len(ids) == 1


def _is_weight(value: Any) -> bool:
    """Return whether a value is the weight of a sample: a 0-d floating tensor."""
    return isinstance(value, Tensor) and value.dim() == 0 and value.is_floating_point()


def _is_reference(weight: Any, value: Any) -> bool:
    """Return whether a value behind another is a frozen model's output behind a weight."""
    is_floating = isinstance(value, Tensor) and value.is_floating_point()
    return _is_weight(weight) and is_floating and value.dim() > 0


def _weights_of(values: Sequence[Any]) -> list[Tensor]:
    """The weights of a batch's samples, float32: 0-d each, or (T,) of its tokens."""
    weights = []
    for number, value in enumerate(values):
        try:
            weight = torch.as_tensor(value, dtype=torch.float32)
        except (TypeError, ValueError, RuntimeError):
            raise ValueError(
                f"sample {number} of the batch has the weight {value!r}, which is no number; drop "
                "samples without a weight (`flowdata weigh --missing drop`), or give them 0"
            ) from None
        weights.append(weight)
    joined = torch.cat([weight.flatten() for weight in weights])
    if not bool(((joined >= 0) & (joined < torch.inf)).all()):
        is_bad = [not bool(((w >= 0) & (w < torch.inf)).all()) for w in weights]
        number = is_bad.index(True)
        raise ValueError(
            f"sample {number} of the batch has the weight {weights[number].tolist()}; weights must "
            "be finite and >= 0 (Scores.weights(missing='zero') gives samples without a loss 0)"
        )
    return weights


def _copies(samples: Sequence[Any]) -> list[Any]:
    """Samples for a further call: some collators take fields out of theirs."""
    return [dict(sample) if isinstance(sample, Mapping) else sample for sample in samples]


def _rows(batch: Any, size: int) -> list[bytes]:
    """The content of each sample's row of a batch, over all its tensors of as many; [] of none.

    Sequences may come first, (B, T, …), or last, (T, B, …).
    """
    parts = list(batch.values()) if isinstance(batch, Mapping) else batch
    parts = parts if isinstance(parts, tuple | list) else [parts]
    tensors = [p for p in parts if isinstance(p, Tensor) and p.dim() and p.layout == torch.strided]
    tensors = [p.mT if p.dim() == 2 and len(p) != size else p for p in tensors]
    columns = [each.detach().cpu() for each in tensors if len(each) == size]
    if not columns:
        return []
    return [b"".join(_bytes_of(column[row]) for column in columns) for row in range(size)]


def _bytes_of(value: Tensor) -> bytes:
    value = value.reshape(-1).clone(memory_format=torch.contiguous_format)
    return value.view(torch.uint8).numpy().tobytes()
