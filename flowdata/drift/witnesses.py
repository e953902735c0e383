"""Witnesses: a few samples of a probe by which it is known again.

Models can be compared on the same samples alone. A list may be shuffled in place between two
measurements, a data set may get another transform, and a collation may draw at random.
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from typing import Any

import torch

from flowdata.models.tensors import tensors_in
from flowdata.store.fingerprint.values import update_digest

_MOST = 8


class Witnesses:
    """Samples from all over a probe, with what they are collated to.

    Args:
        size: samples of the probe.
        batch_of: the place of a sample -> its batch, collated alone.

    Raises:
        ValueError: the collation makes another batch of a sample each time.
    """

    def __init__(self, size: int, batch_of: Callable[[int], Any]) -> None:
        self._batch_of = batch_of
        places = torch.linspace(0, size - 1, min(size, _MOST), dtype=torch.float64).long().tolist()
        self._digests = {place: _digest(batch_of(place)) for place in places}
        if (place := self._changed()) is not None:
            raise ValueError(
                f"collate_fn makes another batch of the probe's sample {place} each time, as "
                "random augmentation or masking does, so that no two models can be compared on it: "
                "pass one that draws nothing"
            )

    def check(self) -> None:
        """Raise ValueError unless the probe is what it was."""
        if (place := self._changed()) is not None:
            raise ValueError(
                f"the probe's sample {place} is another one than when the meter was made: its list "
                "was changed or shuffled in place, or its data set has another transform; give the "
                "meter a probe that stays as it is, such as a copy"
            )

    def _changed(self) -> int | None:
        """The place of a sample that is not what it was, or None."""
        pairs = self._digests.items()
        return next((at for at, old in pairs if _digest(self._batch_of(at)) != old), None)


def _digest(batch: Any) -> bytes:
    digest = hashlib.sha256()
    for tensor in tensors_in(batch):
        update_digest(digest, tensor)
    return digest.digest()
