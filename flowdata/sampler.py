"""Importance resampling: an order of samples drawn ∝ weight, exact on any number of ranks."""

from __future__ import annotations

import functools
import hashlib
import operator
import warnings
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
import torch.distributed as dist
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from flowdata._common.random_draws import (
    CumulativeWeights,
    Ints,
    KeyedPermutation,
    chunks,
    gumbel_top_k,
    multinomial_points,
    sum_of,
    systematic_offset,
    systematic_points,
)
from flowdata.dataset import gather_weights
from flowdata.scores import Missing
from flowdata.weights import Temperature, effective_sample_size

Method: TypeAlias = Literal["systematic", "multinomial"]

_VERSION = 1  # of the order and of state_dict; an order that changes needs another number
_BLOCK = 1 << 13  # indices drawn at a time: arrays of this size stay in a core's cache
_FEW = 0.1  # share of the samples below which the effective sample size is called small


class FlowSampler(DistributedSampler[int]):
    """Draws samples ∝ weight, in an order that depends on (seed, epoch, position) alone.

    Resampling by w and averaging the plain loss estimates Σwℓ / Σw: leave the training loop's
    loss as it is, and never weigh it as well, or the weights act twice.

    Rank r of R takes positions r, r + R, r + 2R, … of the one global order. No position is
    padded, doubled or lost, so ranks differ by one index where R does not divide the draws:
    under DDP pass ``drop_last=True``, or a `num_samples` that R · batch size divides. Any
    number of ranks continues what another began. Call `set_epoch` before each epoch, as with
    every `DistributedSampler`; without it each epoch has the same order.

    How to build it, and what calls `set_epoch`:

    ==================== ============================================== ==================
    loop                 sampler                                        set_epoch
    ==================== ============================================== ==================
    DataLoader           ``FlowSampler(scores)``                        you
    DDP, torchrun        ``FlowSampler(scores, drop_last=True)`` after  you
                         ``init_process_group``
    StatefulDataLoader   as the two above; its own state holds the      you
                         sampler's, workers included
    torchdata.nodes      ``SamplerWrapper(FlowSampler(scores))``        SamplerWrapper
    Accelerate           ``FlowSampler(scores, num_replicas=1,          the prepared
                         rank=0)``; `prepare` shards the batches        loader
    HF Trainer           the same, returned by `_get_train_sampler`     Trainer
    Lightning            ``FlowSampler(scores, drop_last=True)`` made   Trainer
                         in `train_dataloader`, where ranks are known
    ==================== ============================================== ==================

    Accelerate and the Trainer repeat the first indices of an epoch to fill its last batches,
    unless ``even_batches=False``, ``dataloader_drop_last=True`` or a divisible `num_samples`.
    A Trainer that is resumed on several ranks misses the sampler: let a callback's
    `on_epoch_begin` call ``sampler.set_epoch(int(state.epoch))``.

    Args:
        scores_or_weights: `Scores`, or (N,) floating weights >= 0 (a tensor, an array or a
            memory map, which is not copied), or a list of them, for a `ConcatDataset`.
        num_samples: draws of an epoch, over all ranks; N by default, below 2^31.
        replacement: without it, `num_samples` different samples are drawn (Gumbel-top-k);
            with `num_samples` of N that is every sample once, whatever the weights.
        method: with replacement. ``"systematic"``: a sample is drawn within one of
            num_samples · w / Σw times. ``"multinomial"``: independent draws, as in
            `WeightedRandomSampler`, of a higher variance.
        temperature: as in `resolve_temperature`, of each of several scores by itself; weights
            are taken as they are.
        missing: what becomes of samples without a loss: ``"raise"``, or ``"zero"``, never drawn.
        num_replicas: ranks that share the order; those of the process group by default, or 1.
        rank: this one among them; likewise.
        seed: >= 0, the same on every rank.
        drop_last: leave out the up to R − 1 last draws that not every rank would get.

    Raises:
        TypeError, ValueError: an argument is not as above; weights are negative, not finite
            (first index named) or all zero.

    Example:
        >>> import torch
        >>> sampler = FlowSampler(torch.tensor([2.0, 0.0, 1.0, 1.0]), seed=0)
        >>> sorted(sampler)
        [0, 0, 2, 3]
    """

    def __init__(
        self,
        scores_or_weights: Any,
        num_samples: int | None = None,
        *,
        replacement: bool = True,
        method: Method = "systematic",
        temperature: Temperature = "median",
        missing: Missing = "raise",
        num_replicas: int | None = None,
        rank: int | None = None,
        seed: int = 0,
        drop_last: bool = False,
    ) -> None:
        if isinstance(scores_or_weights, Dataset):
            raise TypeError(
                "scores_or_weights must be scores or weights, got a data set: pass its scores, and "
                "load the unweighted data set, or the weights act twice"
            )
        if method not in ("systematic", "multinomial"):
            raise ValueError(f"method must be 'systematic' or 'multinomial', got {method!r}")
        weights = gather_weights(scores_or_weights, temperature=temperature, missing=missing)
        self.weights = weights.cpu().numpy()
        total = sum_of(self.weights)
        if not 0 < total < float("inf"):
            raise ValueError(
                f"weights sum to {total:g}; "
                + ("scale them down" if total else "at least one must be positive")
            )
        num_samples = len(weights) if num_samples is None else num_samples
        if not _is_integer(num_samples):
            raise TypeError(f"num_samples must be an integer, got {num_samples!r}")
        num_samples = int(num_samples)
        if not 0 < num_samples < 2**31:
            raise ValueError(f"num_samples must lie between 1 and 2^31 - 1, got {num_samples}")
        if not replacement and num_samples > (drawable := np.count_nonzero(self.weights)):
            raise ValueError(
                f"num_samples is {num_samples}, but without replacement only the {drawable} of "
                f"{len(weights)} samples with a positive weight can be drawn; ask for no more, or "
                "pass replacement=True"
            )
        grouped = dist.is_available() and dist.is_initialized()
        if num_replicas is None:
            num_replicas = dist.get_world_size() if grouped else 1
        if rank is None:
            rank = dist.get_rank() if grouped else 0
        if not _is_integer(num_replicas) or num_replicas < 1:
            raise ValueError(f"num_replicas must be a positive integer, got {num_replicas!r}")
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"rank must lie between 0 and num_replicas - 1 = {num_replicas - 1}, got {rank}"
            )
        super().__init__(range(num_samples), num_replicas, rank, True, seed, drop_last)  # type: ignore[arg-type]
        self.num_samples = self.total_size = num_samples
        self.seed = _natural("seed", seed)
        self.replacement = replacement
        self.method: Method = method
        self._table = CumulativeWeights(self.weights) if replacement else None
        self._start = self._pass_start = self._next = 0
        self._block: Iterator[int] = iter(())

    def __len__(self) -> int:
        """Return the number of indices that this rank's next pass yields."""
        return len(self._positions(self._start))

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices; the first pass after loading a state goes on there."""
        start = self._start
        if start == self.num_samples:  # a finished epoch is over once, not for ever
            self._start = 0
        return self._iterate(start)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose order begins anew unless it is the current one already."""
        if epoch != self.epoch:
            self.epoch = _natural("epoch", epoch)
            self._rewind(0)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return where the global order stands, for `load_state_dict` on any number of ranks.

        All ranks are taken to have come equally far; the state of one serves all.

        Args:
            consumed: indices that this rank's loop has used in the current pass (since
                `load_state_dict`, if there was one). By default those that were handed out,
                which run ahead of the loop where a plain DataLoader's workers prefetch;
                `StatefulDataLoader` keeps count by itself.

        Raises:
            ValueError: more were consumed than handed out in a whole pass.
        """
        if consumed is None:
            position = self._next - self.num_replicas * operator.length_hint(self._block)
        else:
            whole = len(self._positions(self._pass_start))
            consumed = _natural("consumed", consumed)
            if not 0 <= consumed <= whole:
                raise ValueError(f"consumed must lie between 0 and {whole}, got {consumed}")
            position = self._pass_start + self.num_replicas * consumed
        position = min(position, self.num_samples)
        return {**self._identity(), "epoch": self.epoch, "position": position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, at the next pass, where a sampler with the same weights and options stood.

        Raises:
            TypeError, ValueError: not a state, or one of other weights, options or another
                version; the sampler then stays as it was.
        """
        if not isinstance(state_dict, Mapping):
            raise TypeError(
                "state_dict must be what FlowSampler.state_dict returned, got "
                f"{type(state_dict).__name__}"
            )
        for name, own in self._identity().items():
            if name not in state_dict or state_dict[name] != own:
                raise ValueError(
                    f"state_dict has {name}={state_dict.get(name)!r}, this sampler {own!r}: it was "
                    "saved by another sampler. Build this one with the same weights and options, "
                    "or start the epoch anew"
                )
        epoch = _natural("state_dict['epoch']", state_dict.get("epoch"))
        position = _natural("state_dict['position']", state_dict.get("position"))
        if position > self.num_samples:
            raise ValueError(f"state_dict['position'] is {position} of {self.num_samples} draws")
        if position == self.num_samples and epoch < self.epoch:
            return  # set_epoch has moved on from the epoch that the state ends
        self.epoch = epoch
        self._rewind(position)

    def explain(self) -> dict[str, float]:
        """Return what an epoch will look like; warn where few samples carry it.

        Returns:
            ``effective_sample_size``: (Σw)² / Σw², between 1 and N.
            ``expected_distinct_share``: expected share of the N samples that are seen.
            ``largest_repeat``: expected draws of the heaviest sample.
            ``mean_weight``: Σw / N, the ratio of Σwℓ / N (the paper's loss) to the Σwℓ / Σw that
            resampling estimates: multiply the learning rate by it to compare the two.
        """
        count = len(self.weights)
        mean = sum_of(self.weights) / count
        if not self.replacement:
            distinct, largest = float(self.num_samples), 1.0
        else:
            largest = self.num_samples * float(self.weights.max()) / (mean * count)
            distinct = sum(
                float(self._chance(chunk / (mean * count)).sum()) for chunk in chunks(self.weights)
            )
        effective = effective_sample_size(self.weights)
        if effective < _FEW * count:
            warnings.warn(
                f"{effective:.0f} of {count} samples carry the epoch (effective sample size); a "
                "higher temperature, such as 'mean' or 'ess0.5', spreads the weights",
                stacklevel=2,
            )
        return {
            "effective_sample_size": effective,
            "expected_distinct_share": distinct / count,
            "largest_repeat": largest,
            "mean_weight": mean,
        }

    def _chance(self, share: np.ndarray[Any, np.dtype[np.float64]]) -> Any:
        """The probability that a sample with this share of the weights is drawn at all."""
        if self.method == "systematic":
            return np.minimum(share * self.num_samples, 1)
        with np.errstate(divide="ignore"):
            return -np.expm1(self.num_samples * np.log1p(-np.minimum(share, 1)))

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the sampler that loads it."""
        return {
            "version": _VERSION,
            "algorithm": self.method if self.replacement else "gumbel_top_k",
            "seed": self.seed,
            "num_samples": self.num_samples,
            "weights": self._digest,
        }

    @functools.cached_property
    def _digest(self) -> str:
        digest = hashlib.sha256()
        for chunk in chunks(self.weights):
            digest.update(chunk.data)
        return digest.hexdigest()

    def _rewind(self, position: int) -> None:
        """Let the next pass begin at a global position."""
        self._start = self._pass_start = self._next = position
        self._block = iter(())

    def _positions(self, start: int) -> range:
        """The global positions of this rank in a pass that begins at `start`."""
        stop = self.num_samples
        if self.drop_last:
            stop -= (stop - start) % self.num_replicas
        return range(start + self.rank, stop, self.num_replicas)

    def _iterate(self, start: int) -> Iterator[int]:
        self._start, self._pass_start, self._next = 0, start, start
        positions = self._positions(start)
        if positions:
            order = self._order()
            for first in range(0, len(positions), _BLOCK):
                part = positions[first : first + _BLOCK]
                # What is left of the block tells the position, at no cost for each index.
                self._block = iter(order(np.arange(part.start, part.stop, part.step)).tolist())
                self._next = start + self.num_replicas * (first + len(part))
                yield from self._block
        self._next = self.num_samples

    def _order(self) -> Callable[[Ints], Ints]:
        """The epoch's order: a function from global positions to indices."""
        key, count = (self.seed, self.epoch), self.num_samples
        if self._table is None:
            chosen, shuffled = gumbel_top_k(self.weights, count, key), KeyedPermutation(count, key)
            return lambda positions: chosen[shuffled(positions)]
        table = self._table
        if self.method == "multinomial":
            return lambda positions: table.find(multinomial_points(positions, table.total, key))
        strata, offset = KeyedPermutation(count, key), systematic_offset(table.total, key)
        return lambda positions: table.find(
            systematic_points(strata(positions), table.total, count, offset)
        )


def _natural(name: str, value: Any) -> int:
    """An integer >= 0 that fits a key of the random generator."""
    if not _is_integer(value) or not 0 <= value < 2**64:
        raise ValueError(f"{name} must be an integer >= 0 (below 2^64), got {value!r}")
    return int(value)


def _is_integer(value: Any) -> bool:
    return isinstance(value, int | np.integer) and not isinstance(value, bool)
