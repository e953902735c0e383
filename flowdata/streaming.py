"""Weights for streams: samples scored window by window as they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any, Literal, TypeAlias

import torch
import torch.distributed as dist
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flowdata._common.random_draws import ACCEPTANCE, random_words
from flowdata._common.running_median import RunningMedian
from flowdata.dataset import Layout, weight_attacher
from flowdata.scores import Missing, Scorer
from flowdata.scoring.scorer import LossScorer
from flowdata.weights import flow_weights, resolve_temperature

StreamTemperature: TypeAlias = "Literal['running_median', 'batch_median'] | float"
_VERSION = 1  # of state_dict


class FlowWeightedIterable(IterableDataset[Any]):
    """A stream of samples with their FLOW weight, scored in windows by the frozen model.

    At most one window is read ahead, whatever the consumer does. The scorer runs in the process
    that iterates: keep ``num_workers=0`` behind a model on a GPU, and put the workers in front,
    as ``dataset=StatefulDataLoader(stream, batch_size=None, num_workers=4)``. With
    ``num_workers`` > 0 every worker has a model of its own.

    Samples are dealt out in turn to ranks (`num_replicas` and `rank`) and workers. A source that
    is a PyTorch `IterableDataset` (Hugging Face streams are) splits itself between workers, as
    PyTorch asks of it; one that `split_dataset_by_node` has split needs no `num_replicas`.

    Args:
        dataset: the source: any iterable, a Hugging Face stream, a torchdata node. It resumes
            by its own `state_dict` where it has one, else by skipping what was read.
        scorer: a `LossScorer` of the frozen pre-trained model.
        temperature: ``"running_median"`` of all losses so far, this window's included, within
            0.1 %; ``"batch_median"``, of the window alone; or a positive float, in nats.
        window: samples scored together.
        collate_fn: for the scorer.
        layout: as in `FlowWeightedDataset`.
        key: as in `FlowWeightedDataset`.
        missing: what becomes of samples without a loss: ``"raise"``, or ``"zero"`` for weight 0.
        resample: yield a sample with a probability of its weight, and without the weight:
            leave the training loop's loss as it is.
        num_replicas: ranks that share a source which each of them reads whole.
        rank: this one among them.
        seed: of resampling.

    Raises:
        TypeError, ValueError: an argument is not as above; while iterating, a loss is missing,
            or a median is 0.

    Example:
        >>> import torch
        >>> from flowdata.scoring.scorer import LossScorer
        >>> _ = torch.manual_seed(0)
        >>> source = [(torch.randn(4), torch.tensor(i % 3)) for i in range(6)]
        >>> scorer = LossScorer(torch.nn.Linear(4, 3), progress=False)
        >>> stream = FlowWeightedIterable(source, scorer, window=3)
        >>> [weight.shape for sample, weight in stream] == [()] * 6
        True
    """

    def __init__(
        self,
        dataset: Iterable[Any],
        scorer: Scorer,
        *,
        temperature: StreamTemperature = "running_median",
        window: int = 256,
        collate_fn: Callable[[list[Any]], Any] | None = None,
        layout: Layout = "pair",
        key: str = "weight",
        missing: Missing = "raise",
        resample: bool = False,
        num_replicas: int = 1,
        rank: int = 0,
        seed: int = 0,
    ) -> None:
        if not hasattr(dataset, "__iter__") and not hasattr(dataset, "__getitem__"):
            raise TypeError(f"dataset must be iterable, got {type(dataset).__name__}")
        if not hasattr(scorer, "score"):
            raise TypeError(f"scorer must be a LossScorer, got {type(scorer).__name__}")
        if temperature not in ("running_median", "batch_median"):
            if isinstance(temperature, str):
                raise ValueError(
                    "temperature of a stream must be 'running_median', 'batch_median' or a "
                    f"positive float, got {temperature!r}"
                )
            temperature = resolve_temperature(torch.ones(1), temperature)
        for name, value, least in (("window", window, 1), ("seed", seed, 0)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name} must be an integer >= {least}, got {value!r}")
        if missing not in ("raise", "zero"):
            raise ValueError(f"missing must be 'raise' or 'zero', got {missing!r}")
        if not 0 <= rank < num_replicas:
            raise ValueError(
                f"rank must lie between 0 and num_replicas - 1 = {num_replicas - 1}, got {rank}"
            )
        self.dataset = _as_iterable(dataset)
        self.scorer = scorer
        self.temperature: StreamTemperature = temperature
        self.window = window
        self.collate_fn = collate_fn
        self.missing: Missing = missing
        self.resample = resample
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._attach = weight_attacher(layout, key)
        self._median = RunningMedian()  # of what this process has read
        self._others = RunningMedian()  # of the other ranks, when they were last merged
        self._source_state: Any = None  # at the start of the current window
        self._fresh_state: Any = None  # of a Hugging Face stream before anything was read
        self._in_use: float | None = None  # the current window's temperature
        self._read = self._yielded = 0  # samples before the current window; within it
        self._begun = self._ended = False

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the samples; the first pass after loading a state goes on there."""
        if self._begun:  # an earlier pass has left its position behind
            self._rewind()
        self._begun = True
        return self._iterate()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the source, if it has any, and of resampling."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self._rewind()

    def merge_ranks(self, group: Any = None) -> None:
        """Let the running median from here on include what the other ranks have read so far.

        A collective: every rank of the process group calls it at the same point of its loop, in
        the process that iterates.
        """
        counts: list[Any] = [None] * dist.get_world_size(group)
        dist.all_gather_object(counts, dict(self._median.counts), group=group)
        del counts[dist.get_rank(group)]
        self._others = sum(map(RunningMedian, counts), RunningMedian())

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: plain data.

        It holds the source's state at the start of the current window, how far the window has
        been yielded, its temperature, and the running median's counts. The window is read and
        scored again, so that a source that does not resume exactly (a Hugging Face shuffle
        buffer is refilled with other samples) still gives every sample its own weight.
        """
        return {
            **self._identity(),
            "epoch": self.epoch,
            "source": self._source_state,
            "read": self._read,
            "in_use": self._in_use,
            "yielded": self._yielded,
            "ended": self._ended,
            "median": dict(self._median.counts),
            "others": dict(self._others.counts),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, at the next pass, exactly where a stream with the same options stood.

        Raises:
            ValueError: the state is of other options or another version; the stream then stays
                as it was.
        """
        for name, own in self._identity().items():
            if name not in state_dict or state_dict[name] != own:
                raise ValueError(
                    f"state_dict has {name}={state_dict.get(name)!r}, this stream {own!r}: it was "
                    "saved by another stream. Build this one with the same options, or start anew"
                )
        self.set_epoch(state_dict["epoch"])
        self._begun, self._ended = False, state_dict["ended"]
        self._source_state, self._read = state_dict["source"], state_dict["read"]
        self._in_use, self._yielded = state_dict["in_use"], state_dict["yielded"]
        self._median = _median_of(state_dict["median"])
        self._others = _median_of(state_dict["others"])

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the stream that loads it."""
        return {
            "version": _VERSION,
            "temperature": self.temperature,
            "window": self.window,
            "resample": self.resample,
            "seed": self.seed,
            "share": self._share(),
        }

    def _share(self) -> list[int]:
        """Which share of the samples is this process's, and of how many."""
        worker = get_worker_info()
        workers, number = (1, 0) if worker is None else (worker.num_workers, worker.id)
        return [self.rank * workers + number, self.num_replicas * workers]

    def _rewind(self) -> None:
        """Let the next pass begin at the start of the source."""
        self._source_state = self._in_use = None
        self._read = self._yielded = 0
        self._begun = self._ended = False

    def _iterate(self) -> Iterator[Any]:
        if self._ended:
            return
        samples = self._samples()
        while window := list(islice(samples, self.window)):
            weights = self._weigh(window)
            accepted = self._accepted(weights) if self.resample else []
            while self._yielded < len(window):
                index = self._yielded
                self._yielded += 1
                if not self.resample:
                    yield self._attach(window[index], weights[index].clone())
                elif accepted[index]:
                    yield window[index]
            self._source_state = self._state_of_source()
            self._read += len(window)
            self._in_use, self._yielded = None, 0
        self._ended = True

    def _samples(self) -> Iterator[Any]:
        """This process's share of the source, from the start of the current window."""
        share, shares = self._share()
        if isinstance(self.dataset, IterableDataset):
            share, shares = self.rank, self.num_replicas
        if type(self.dataset).__module__.startswith("datasets."):
            if self._fresh_state is None:
                self._fresh_state = self.dataset.state_dict()
            elif self._source_state is None:  # else it would begin where it was last resumed
                self.dataset.load_state_dict(self._fresh_state)
        if self._source_state is None:
            return islice(self.dataset, share + shares * self._read, None, shares)
        self.dataset.load_state_dict(self._source_state)
        return islice(self.dataset, shares - 1, None, shares)  # it stands behind our last sample

    def _state_of_source(self) -> Any:
        return self.dataset.state_dict() if hasattr(self.dataset, "state_dict") else None

    def _weigh(self, window: list[Any]) -> Tensor:
        """(W,) weights of a window, its losses counted in the running median."""
        alone: dict[str, Any] = {"shared": False} if isinstance(self.scorer, LossScorer) else {}
        scores = self.scorer.score(window, collate_fn=self.collate_fn, dataset_id="window", **alone)
        losses = scores.losses.detach().cpu()
        present = losses.isfinite()
        if self.missing == "raise" and not present.all():
            raise ValueError(
                f"sample {self._read + int((~present).int().argmax())} of the stream has no loss "
                "(no target, or a non-finite loss); drop such samples from the source, or pass "
                "missing='zero' to give them weight 0"
            )
        weights = torch.zeros(len(losses))
        if present.any():
            if self._in_use is None:  # else the window is resumed, and counted already
                self._in_use = self._temperature_of(losses[present])
            weights[present] = flow_weights(losses[present], temperature=self._in_use)
        return weights

    def _temperature_of(self, losses: Tensor) -> float:
        if not isinstance(self.temperature, str):
            return self.temperature
        if self.temperature == "batch_median":
            median = losses.double().quantile(0.5).item()
        else:
            self._median.update(losses)
            median = (self._median + self._others).median()
        if median == 0:
            raise ValueError(
                f"temperature={self.temperature!r} is 0 up to sample {self._read + len(losses)} of "
                "the stream: half of the losses are 0; pass a positive float as temperature"
            )
        return median

    def _accepted(self, weights: Tensor) -> list[bool]:
        """Which samples of the window resampling keeps: a function of seed and position."""
        first = (self._share()[0] << 48) + self._read
        words = random_words((self.seed, self.epoch), ACCEPTANCE, first, len(weights))
        uniform = torch.from_numpy((words >> 11).astype("float64") * 2.0**-53)
        accepted: list[bool] = (uniform < weights).tolist()
        return accepted


def _median_of(counts: Mapping[Any, int]) -> RunningMedian:
    """A median from its state, which may have been JSON in between."""
    return RunningMedian({int(bucket): count for bucket, count in counts.items()})


def _as_iterable(dataset: Any) -> Any:
    """A torchdata node is iterated, saved and restored through its Loader."""
    if hasattr(dataset, "get_state") and hasattr(dataset, "reset"):
        from torchdata.nodes import Loader

        return Loader(dataset, restart_on_stop_iteration=False)
    return dataset
