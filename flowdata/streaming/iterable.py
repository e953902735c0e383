"""A stream of samples with their weights: scored window by window as they pass."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset, get_worker_info

from flowdata._common.data_sets import check_stream
from flowdata._common.random_draws import ACCEPTANCE, random_words
from flowdata._common.resumable import check_natural, check_rank, check_state
from flowdata._common.values import check_values
from flowdata.dataset import Layout, check_bare, weight_attacher
from flowdata.scoring.scorer import Scorer
from flowdata.streaming.shared import SharedMarks
from flowdata.streaming.source import StreamSource
from flowdata.streaming.temperature import (
    StreamTemperature,
    WindowTemperature,
    as_plain_data,
    check_stream_temperature,
)
from flowdata.streaming.window_scorer import WindowScorer
from flowdata.weights import Missing, check_missing, warn_of_useless_weights, weigh

_VERSION = 1  # of state_dict


class FlowWeightedIterable(IterableDataset[Any]):
    """A stream of samples with their FLOW weight, scored in windows by the frozen model.

    At most one window is read ahead, whatever the consumer does. The scorer runs in the process
    that iterates: keep ``num_workers=0`` behind a model on a GPU, and put the workers in front,
    as ``dataset=StatefulDataLoader(stream, batch_size=None, num_workers=4)``. With
    ``num_workers`` > 0 every worker has a model of its own, and the position is the workers': a
    `StatefulDataLoader` saves it, and `state_dict` of the stream itself is refused.

    Samples are dealt out in turn to ranks (`num_replicas` and `rank`) and workers. A source that
    is a PyTorch `IterableDataset` (Hugging Face streams are) splits itself between workers, as
    PyTorch asks of it; one that `split_dataset_by_node` has split needs no `num_replicas`.

    A stream has one position, and so one pass at a time: a new pass ends the one before. A sample
    counts as given once the iterator has handed it over; ``zip(stream, other)`` takes one more
    than it passes on where `other` is the shorter.

    On several ranks a running median is of the samples that its own rank has read. Ranks whose
    shares are alike agree after some hundreds of samples, to within the noise of so many losses.
    Where shares differ (files of other kinds on every node), let all ranks call `merge_ranks` at
    the same steps of their loops, such as every hundredth: they then weigh by one temperature.

    Args:
        dataset: the source: any iterable, a map-style data set, a Hugging Face stream, a
            torchdata node. A map-style one resumes by index, another by its own `state_dict`
            where it has one, else by skipping what was read. A generator gives one pass.
        scorer: a `LossScorer` of the frozen pre-trained model, or anything with its `score`. It
            is left as it is; what it chose is said once, not for every window.
        temperature: ``"running_median"`` of all losses so far, those of this window included,
            within 0.1 %; ``"batch_median"``, of the window alone; or a positive float, in nats.
            While a running median is 0, windows pass whose losses are all 0, with weights of 1.
        window: samples scored together.
        collate_fn: makes a batch of samples, for the scorer.
        layout: as in `FlowWeightedDataset`; not under `resample`, whose samples have no weight.
        key: as in `FlowWeightedDataset`; not under `resample`.
        missing: ``"raise"`` refuses samples without a loss, ``"zero"`` gives them weight 0.
        resample: yield samples without a weight, each with the probability that is its weight;
            the training loop's loss then stays as it is.
        num_replicas: number of ranks, each of which reads the whole source and yields its share.
        rank: this rank's number among them.
        seed: of resampling.

    Raises:
        TypeError, ValueError: an argument is not as above; while iterating, a loss is missing,
            a median is 0, or the source can't be read once more.
        RuntimeError: an iterator goes on after another pass has begun, the epoch was changed or
            a state loaded.

    Example:
        >>> import torch
        >>> from flowdata import LossScorer
        >>> _ = torch.manual_seed(0)
        >>> source = [(torch.randn(4), torch.tensor(i % 3)) for i in range(6)]
        >>> scorer = LossScorer(torch.nn.Linear(4, 3), progress=False)
        >>> stream = FlowWeightedIterable(source, scorer, window=3)
        >>> [weight.shape for sample, weight in stream] == [()] * 6
        True
    """

    # Where the stream stands. The source's position is the start of the current window; a state
    # leads back to it, and the samples that the loop has been given are skipped then::
    #
    #      earlier windows      current window
    #    ├───────┼───────┼────────────┬─────────┼ ─ ─ ─ ─ ─   not read yet
    #                    │            └ _index: the next sample that the loop gets
    #                    └ the source's position
    _index: int  # in the current window
    _window_temperature: float | None  # the current window's; None until it is scored
    _in_pass: bool  # a pass has begun since the stream was rewound or a state loaded
    _at_end: bool  # the pass has been through the whole source
    _pass = 0  # the number of the pass that may move the position

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
        check_stream(dataset)
        temperature = check_stream_temperature(temperature)
        check_natural("window", window, least=1)
        check_natural("seed", seed)
        check_missing(missing)
        check_rank(rank, num_replicas)
        self._scorer = WindowScorer(scorer, collate_fn)
        self.temperature: StreamTemperature = temperature
        self.window = window
        self.missing: Missing = missing
        self.resample = resample
        self.num_replicas = num_replicas
        self.rank = rank
        self.seed = seed
        self.epoch = 0
        self._shared = SharedMarks()
        self._source = StreamSource(dataset, rank, num_replicas)
        if resample:
            check_bare(layout, key)
        self._attach = weight_attacher(layout, key)
        self._temperatures = WindowTemperature(temperature)
        self._rewind()

    @property
    def dataset(self) -> Any:
        """The source; a torchdata node stands in its `Loader`."""
        return self._source.dataset

    @property
    def scorer(self) -> Scorer:
        """The scorer as it was given."""
        return self._scorer.scorer

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the samples; the first pass after loading a state goes on there.

        Raises:
            ValueError: this is a loader's worker, and the state was loaded outside it.
        """
        self._meet_main_process()
        if self._in_pass:
            self._rewind()  # from wherever an earlier pass stopped
        self._in_pass = True
        return self._iterate(self._pass)

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which resampling depends on, and the source's where it has epochs.

        It reaches the workers of a loader, persistent ones too, at the passes that begin after it.
        """
        self._shared.announce_epoch(check_natural("epoch", epoch))
        self._enter_epoch(epoch)

    def merge_ranks(self, group: Any = None) -> None:
        """Let the running median include what the other ranks have read until now.

        What they read later counts after the next call. The call is a collective: every rank of
        the process group makes it at the same point of its loop, in the process that iterates.
        """
        self._temperatures.merge_ranks(group)

    def state_dict(self) -> dict[str, Any]:
        """Return where the stream stands: plain data.

        The state holds the source's state at the start of the current window, the number of the
        window's samples that the loop has been given, the window's temperature, and the running
        median's counts. A stream that loads the state reads and scores the window again, so that
        every sample has the weight of its own loss even if the source does not resume exactly (a
        Hugging Face shuffle buffer is refilled with other samples, of which a warning tells).

        Raises:
            ValueError: the workers of a loader read the stream, each at a position of its own.
        """
        if get_worker_info() is None and self._shared.read_by_workers:
            raise ValueError(
                "the stream's position is that of the loader's workers: save the state_dict of a "
                "torchdata.stateful_dataloader.StatefulDataLoader over the stream, or iterate "
                "with num_workers=0"
            )
        return {
            **self._identity(),
            "epoch": self.epoch,
            **self._source.state_dict(),
            "in_use": as_plain_data(self._window_temperature),
            "yielded": self._index,
            "ended": self._at_end,
            **self._temperatures.state_dict(),
        }

    def load_state_dict(self, state_dict: Mapping[str, Any]) -> None:
        """Go on, at the next pass, exactly where a stream with the same options stood.

        Raises:
            TypeError, ValueError: not a state, or one of other options or another version; the
                stream then stays as it was.
        """
        check_state(
            state_dict,
            self._identity(),
            maker="FlowWeightedIterable",
            what="stream",
            remedy="Build this one with the same options, or start anew",
        )
        self._source.check_state(state_dict)
        self._enter_epoch(state_dict["epoch"])
        self._rewind()
        self._source.load_state_dict(state_dict)
        self._shared.loaded_outside = get_worker_info() is None
        self._window_temperature, self._index = state_dict["in_use"], state_dict["yielded"]
        self._at_end = state_dict["ended"]
        self._temperatures.load_state_dict(state_dict)

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the stream that loads it."""
        return {
            "version": _VERSION,
            "temperature": as_plain_data(self.temperature),
            "window": self.window,
            "resample": self.resample,
            "seed": self.seed,
            "share": list(self._source.share()),
        }

    def _rewind(self) -> None:
        """Let the next pass begin at the start of the source, and no other go on."""
        self._source.rewind()
        self._window_temperature, self._index = None, 0
        self._in_pass = self._at_end = self._shared.loaded_outside = False
        self._pass += 1

    def _enter_epoch(self, epoch: int) -> None:
        """Set this process's epoch, and the source's."""
        self._source.set_epoch(epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self._rewind()

    def _meet_main_process(self) -> None:
        """Take in what the main process did to its copy of the stream; tell it who reads."""
        in_worker = get_worker_info() is not None
        if in_worker and self._shared.loaded_outside:
            raise ValueError(
                "the stream has loaded a state outside the loader's workers, whose positions it "
                "can't give: load the state of a StatefulDataLoader over the stream, or iterate "
                "with num_workers=0"
            )
        self._shared.read_by_workers = in_worker
        if not in_worker:
            self._shared.loaded_outside = False
        epoch = self._shared.new_epoch()
        if epoch is not None:
            self._enter_epoch(epoch)

    def _iterate(self, number: int) -> Iterator[Any]:
        """The pass with this number."""
        self._check_current(number)
        if self._at_end:
            return
        for window in self._source.windows(self.window):
            for item in self._rest_of(window):
                yield item
                self._check_current(number)
            # The source moves on only after the window's last sample: until then a state has to
            # lead back to the window's start.
            self._source.advance(len(window))
            self._window_temperature, self._index = None, 0
        self._at_end = True
        self._temperatures.check_end()

    def _check_current(self, number: int) -> None:
        """Refuse to move the position of another pass."""
        if number != self._pass:
            raise RuntimeError(
                "this iterator of the stream is over: since it began, another pass has begun, the "
                "epoch was changed or a state loaded. A stream gives one pass at a time; build "
                "a second stream to read it twice at once"
            )

    def _rest_of(self, window: list[Any]) -> Iterator[Any]:
        """Yield the samples of a window that the loop has not been given yet."""
        weights = self._weigh(window)
        draws = self._draw(weights) if self.resample else []
        while self._index < len(window):
            index = self._index
            # The loop may ask for the state as soon as it has the sample, so the index moves first.
            self._index += 1
            if not self.resample:
                yield self._attach(window[index], weights[index].clone())
            elif draws[index]:
                yield window[index]

    def _weigh(self, window: list[Any]) -> Tensor:
        """The (W,) weights of a window; a running median counts the window's losses first."""
        losses = self._scorer.losses(window)
        present = losses.isfinite()
        if self.missing == "raise" and not present.all():
            first = self._source.position + int((~present).int().argmax())
            raise ValueError(
                f"sample {first} of the stream has no loss (no target, or a non-finite loss); drop "
                "such samples from the source, or pass missing='zero' to give them weight 0"
            )
        weights = torch.zeros(len(losses), dtype=torch.float32)
        if present.any():
            # The state of a resumed window brings its temperature and a median that has counted
            # its losses: to count them again would double them.
            check_values(losses[present])
            if self._window_temperature is None or not isinstance(self.temperature, str):
                self._window_temperature = self._temperatures.of_window(
                    losses[present], self._source.position
                )
            weights[present] = weigh(losses[present], self._window_temperature)
            if self._source.position == 0:  # one window speaks for the stream
                warn_of_useless_weights(
                    losses,
                    weights,
                    self.temperature,
                    unit="samples of the stream's first window",
                    remedies={"running_median": "median"},
                )
        return weights

    def _draw(self, weights: Tensor) -> list[bool]:
        """Whether resampling yields each sample of the window: a function of seed and position."""
        # Every share has 2^48 random words of the epoch to itself, one for each of its samples.
        first = (self._source.share()[0] << 48) + self._source.position
        words = random_words((self.seed, self.epoch), ACCEPTANCE, first, len(weights))
        # A float64 holds 53 bits exactly. The numbers lie in [0, 1), so that a weight of 1 is
        # larger than any of them and its sample always drawn.
        uniform = torch.from_numpy((words >> 11).astype("float64") * 2.0**-53)
        draws: list[bool] = (uniform < weights).tolist()
        return draws
