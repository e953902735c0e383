"""A sampler that draws samples ∝ weight, the same order on any number of ranks."""

from __future__ import annotations

import operator
from collections.abc import Iterator, Mapping
from typing import Any, Literal, TypeAlias

import numpy as np
from torch.utils.data import Dataset
from torch.utils.data.distributed import DistributedSampler

from flowdata._common.notices import logger, warn_once
from flowdata._common.random_draws import sum_of
from flowdata._common.resumable import check_natural, check_state
from flowdata.sampler.epoch_orders import EpochOrders
from flowdata.sampler.loaded_data import LoadedData
from flowdata.sampler.sharing import Share
from flowdata.scores.gathering import gather_weights
from flowdata.weights import Missing, Normalize, Temperature, effective_sample_size

Method: TypeAlias = Literal["systematic", "multinomial"]

_BLOCK = 1 << 13  # indices drawn at a time: arrays of this size stay in a core's cache
_SMALL_SHARE = 0.1  # an effective sample size below this share of the samples is called small


class FlowSampler(DistributedSampler[int]):
    """Draws samples ∝ weight, in an order that depends on (seed, epoch, position) alone.

    Resampling by w and averaging the plain loss estimates Σwℓ / Σw: leave the training loop's
    loss as it is. To weigh it as well, by a `FlowWeightedDataset`, would apply the weights twice.

    Rank r of R takes positions r, r + R, r + 2R, … of the one global order. No position is
    padded, doubled or lost, so ranks differ by one index where R does not divide the draws:
    under DDP pass ``drop_last=True``, or a `num_samples` that R · batch size divides. Any
    number of ranks continues what another began. Call `set_epoch` before each epoch, as with
    every `DistributedSampler`; without it each epoch has the same order, which is warned of.

    The ranks are those of the process group when a pass begins, so that the sampler may be made
    before the group. Where an `Accelerator` has several ranks, the loader that `prepare` returns
    deals out the batches of the whole order; a pass that would be shared twice, or not at all, is
    refused, as is a loader's data set of another number of samples. How to build it, and what
    calls `set_epoch`:

    ==================== ============================================== ==================
    loop                 sampler                                        set_epoch
    ==================== ============================================== ==================
    DataLoader           ``FlowSampler(scores)``                        you
    DDP, torchrun        ``FlowSampler(scores, drop_last=True)``        you
    StatefulDataLoader   as the two above; its own state holds the      you
                         sampler's, workers included
    torchdata.nodes      ``SamplerWrapper(FlowSampler(scores))``        SamplerWrapper
    ignite               as DDP; `auto_dataloader` leaves it as it is   you
    Accelerate           ``FlowSampler(scores)`` in the loader that     the prepared
                         `prepare` is given                             loader
    HF Trainer           the same, returned by `_get_train_sampler`     Trainer
    Lightning            ``FlowSampler(scores, drop_last=True)``        Trainer
    ==================== ============================================== ==================

    Accelerate and the Trainer repeat the first indices of an epoch to fill its last batches,
    unless ``even_batches=False``, ``dataloader_drop_last=True`` or a divisible `num_samples`.
    After a resumption Accelerate begins at epoch 0 again, until you call the prepared loader's
    `set_epoch`. A Trainer that is resumed on several ranks misses the sampler: let a callback's
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
        temperature: as in `resolve_temperature`, of each of several scores by itself. Only
            scores use it: weights are taken as they are.
        missing: ``"raise"`` refuses samples without a loss, ``"zero"`` never draws them.
        normalize: ``"mean"`` divides the weights by their mean. Draws depend on the ratios of
            weights alone, so this matters only together with `max_weight`.
        max_weight: caps the weights, after normalising, and with them the draws of the heaviest
            samples.
        num_replicas: number of ranks that share the order; by default that of the process group
            when a pass begins, or 1 without one or under an Accelerator.
        rank: this rank's number among them; by default that in the process group, or 0.
        seed: >= 0, the same on every rank.
        drop_last: leave out the last draws where they are too few for every rank to get one.

    Raises:
        TypeError, ValueError: an argument is not as above; weights are negative, not finite
            (first index named) or all zero.

    Example:
        >>> import torch
        >>> sampler = FlowSampler(torch.tensor([2.0, 0.0, 1.0, 1.0]), seed=0)
        >>> sorted(sampler)
        [0, 0, 2, 3]
    """

    # Where the sampler stands, in global positions (`_iterate` has a picture):
    _start: int  # where the next pass begins
    _pass_start: int  # where the current pass began, or the last one if none is under way
    _next: int  # the first position behind the current block
    _block: Iterator[int]  # the indices of the current block that the loop has not been given yet
    _stride: int  # the number of ranks that share the current pass
    _is_finished: bool  # whether a pass reached the epoch's end, and no other epoch was chosen

    def __init__(
        self,
        scores_or_weights: Any,
        num_samples: int | None = None,
        *,
        replacement: bool = True,
        method: Method = "systematic",
        temperature: Temperature = "median",
        missing: Missing = "raise",
        normalize: Normalize = "none",
        max_weight: float | None = None,
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
        if not replacement and method != "systematic":
            raise ValueError(
                f"method={method!r} is one of drawing with replacement, and would be ignored "
                "without: leave it out, or leave replacement=True"
            )
        weights = gather_weights(
            scores_or_weights,
            temperature=temperature,
            missing=missing,
            normalize=normalize,
            max_weight=max_weight,
        )
        self.weights = weights.cpu().numpy()
        self._loaded = LoadedData(self.weights, scores_or_weights)
        self._orders = EpochOrders(
            self.weights,
            len(weights) if num_samples is None else num_samples,
            method if replacement else "gumbel_top_k",
            check_natural("seed", seed),
        )
        count = self._orders.num_samples
        self._share = Share(num_replicas, rank)
        super().__init__(range(count), *self._share.ranks(), True, seed, drop_last)  # type: ignore[arg-type]
        self.num_replicas, self.rank = num_replicas, rank  # None again: torch's has set numbers
        self.num_samples = self.total_size = count
        self.replacement = replacement
        self.method: Method = method
        self._rewind(0)

    @property
    def seed(self) -> int:
        """The seed of all orders; a change takes effect at the next pass."""
        return self._orders.seed

    @seed.setter
    def seed(self, value: int) -> None:
        self._orders.seed = check_natural("seed", value)

    @property
    def num_replicas(self) -> int:
        """The number of ranks that share the order: as given, or as the process group has now."""
        return self._share.ranks()[0]

    @num_replicas.setter
    def num_replicas(self, value: int | None) -> None:
        self._share.num_replicas = value

    @property
    def rank(self) -> int:
        """This rank's number among them."""
        return self._share.ranks()[1]

    @rank.setter
    def rank(self, value: int | None) -> None:
        self._share.rank = value

    def __len__(self) -> int:
        """Return the number of indices of this rank's epoch, also where a pass resumes within."""
        return len(self._positions(0))

    def __iter__(self) -> Iterator[int]:
        """Iterate over this rank's indices; the first pass after loading a state goes on there."""
        start = self._start
        if start == self.num_samples:
            # The state that was loaded stands at the end of its epoch, so that this pass is
            # empty. The pass after it is whole, even if the loop asks this one for no index.
            self._start = 0
        return self._iterate(start)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, whose order begins anew unless it is the current one already."""
        self._is_finished = False  # to draw an epoch again is now what the loop asks for
        if epoch != self.epoch:
            self.epoch = check_natural("epoch", epoch)
            self._rewind(0)

    def state_dict(self, consumed: int | None = None) -> dict[str, Any]:
        """Return the position in the global order, for `load_state_dict` on any number of ranks.

        All ranks are assumed to have come equally far, so that the state of one serves all.

        Args:
            consumed: number of indices that this rank's loop has used in the current pass (since
                `load_state_dict`, if there was one). The default is the number that the sampler
                has given out, which runs ahead of the loop where a plain DataLoader's workers
                prefetch; `StatefulDataLoader` keeps count by itself.

        Raises:
            ValueError: `consumed` is more than a whole pass has.
        """
        if consumed is None:
            # Each index that is left in the block stands for one position on every rank.
            position = self._next - self._stride * operator.length_hint(self._block)
        else:
            pass_length = len(self._positions(self._pass_start))
            consumed = check_natural("consumed", consumed)
            if consumed > pass_length:
                raise ValueError(f"consumed must lie between 0 and {pass_length}, got {consumed}")
            position = self._pass_start + self._stride * consumed
        position = min(position, self.num_samples)
        return {**self._orders.identity, "epoch": self.epoch, "position": position}

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, at the next pass, where a sampler with the same weights and options stood.

        Raises:
            TypeError, ValueError: not a state, or one of other weights, options or another
                version; the sampler then stays as it was.
        """
        check_state(
            state_dict,
            self._orders.identity,
            maker="FlowSampler",
            what="sampler",
            remedy="Build this one with the same weights and options, or start the epoch anew",
        )
        epoch = check_natural("state_dict['epoch']", state_dict.get("epoch"))
        position = check_natural("state_dict['position']", state_dict.get("position"))
        if position > self.num_samples:
            raise ValueError(f"state_dict['position'] is {position} of {self.num_samples} draws")
        if position == self.num_samples and epoch < self.epoch:
            # The state stands at the end of an epoch, and `set_epoch` has already chosen a later
            # one. Loaders that restore late, within their first pass, load such states.
            return
        self.epoch = epoch
        self._rewind(position)

    def summary(self) -> dict[str, float]:
        """Return the figures that describe an epoch.

        Returns:
            ``effective_sample_size``: (Σw)² / Σw², between 1 and N.
            ``expected_distinct_share``: expected share of the N samples drawn at least once.
            ``largest_repeat``: expected draws of the heaviest sample.
            ``mean_weight``: Σw / N. The paper's loss Σwℓ / N is this many times the Σwℓ / Σw that
            resampling estimates: multiply the learning rate by it to compare the two.

        Example:
            >>> import torch
            >>> FlowSampler(torch.tensor([2.0, 0.0, 1.0, 1.0])).summary()["largest_repeat"]
            2.0
        """
        count = len(self.weights)
        return {
            "effective_sample_size": effective_sample_size(self.weights),
            "expected_distinct_share": self._orders.expected_distinct() / count,
            "largest_repeat": self._orders.expected_repeats(),
            "mean_weight": sum_of(self.weights) / count,
        }

    def explain(self) -> str:
        """Return two sentences on what an epoch will look like; warn where few samples carry it.

        Example:
            >>> import torch
            >>> sampler = FlowSampler(torch.tensor([2.0, 0.0, 1.0, 1.0]))
            >>> print(sampler.explain())  # doctest: +NORMALIZE_WHITESPACE
            An epoch of 4 systematic draws is expected to see 75.0% of the 4 samples, the heaviest
            2.0 times. The effective sample size of the weights is 2.7, their mean 1.
        """
        count, figures = len(self.weights), self.summary()
        effective_size = figures["effective_sample_size"]
        if effective_size < _SMALL_SHARE * count:
            logger.warning(
                f"{effective_size:.0f} of {count} samples carry the epoch (effective sample size); "
                "a higher temperature, such as 'mean' or 'ess0.5', spreads the weights"
            )
        draws = f"{self.method} draws" if self.replacement else "draws without replacement"
        return (
            f"An epoch of {self.num_samples:,} {draws} is expected to see "
            f"{figures['expected_distinct_share']:.1%} of the {count:,} samples, the heaviest "
            f"{figures['largest_repeat']:.1f} times. The effective sample size of the weights is "
            f"{effective_size:,.1f}, their mean {figures['mean_weight']:.3g}."
        )

    def _rewind(self, position: int) -> None:
        """Let the next pass begin at a global position."""
        self._start = self._pass_start = self._next = position
        self._block = iter(())
        self._stride = self.num_replicas
        self._is_finished = False

    def _positions(self, start: int) -> range:
        """The global positions of this rank in a pass that begins at `start`."""
        num_replicas, rank = self._share.ranks()
        stop = self.num_samples
        if self.drop_last:
            stop -= (stop - start) % num_replicas
        return range(start + rank, stop, num_replicas)

    def _iterate(self, start: int) -> Iterator[int]:
        """Walk through a pass, block by block.

        With two ranks and blocks of three indices, rank 0 takes the positions without brackets::

            0 [1] 2 [3] 4 [5]   6 [7] 8 [9] 10 [11]   …
            └── one block ──┘   └── the next one ─┘
            start               _next, while the loop takes the first block
        """
        self._share.check_pass(self)  # at the first draw, when a process group exists if ever
        self._loaded.check()
        if self._is_finished:
            warn_once(
                f"FlowSampler draws epoch {self.epoch} again, the same samples in the same order: "
                "call sampler.set_epoch(epoch) before each epoch",
                about="FlowSampler without set_epoch",
            )
        self._start, self._pass_start, self._next = 0, start, start
        self._stride = self.num_replicas
        positions = self._positions(start)
        if positions:
            order = self._orders.of_epoch(self.epoch)
            for first in range(0, len(positions), _BLOCK):
                part = positions[first : first + _BLOCK]
                # `state_dict` reads the position off the length of what is left in the block, so
                # that no index has to be counted here.
                self._block = iter(order(np.arange(part.start, part.stop, part.step)).tolist())
                self._next = start + self._stride * (first + len(part))
                yield from self._block
        self._next, self._is_finished = self.num_samples, True
