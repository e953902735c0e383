"""A stream of samples with their weights: scored window by window as they pass."""

from __future__ import annotations

import inspect
from collections.abc import Callable, Iterable, Iterator, Mapping
from itertools import islice
from typing import Any

import torch
from torch import Tensor
from torch.utils.data import IterableDataset

from flowdata._common.random_draws import ACCEPTANCE, random_words
from flowdata._common.resumable import check_natural, check_rank, check_state
from flowdata.dataset import Layout, weight_attacher
from flowdata.scores import Scorer
from flowdata.streaming.source import StreamSource
from flowdata.streaming.temperature import StreamTemperature, WindowTemperature
from flowdata.weights import Missing, positive_number, warn_of_useless_weights, weigh

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

    On several ranks a running median is of the samples that its own rank has read. Ranks whose
    shares are alike agree after some hundreds of samples, to within the noise of so many losses.
    Where shares differ (files of other kinds on every node), let all ranks call `merge_ranks` at
    the same steps of their loops, such as every hundredth: they then weigh by one temperature.

    Args:
        dataset: the source: any iterable, a Hugging Face stream, a torchdata node. It resumes
            by its own `state_dict` where it has one, else by skipping what was read.
        scorer: a `LossScorer` of the frozen pre-trained model, or anything with its `score`.
        temperature: ``"running_median"`` of all losses so far, those of this window included,
            within 0.1 %; ``"batch_median"``, of the window alone; or a positive float, in nats.
        window: samples scored together.
        collate_fn: makes a batch of samples, for the scorer.
        layout: as in `FlowWeightedDataset`.
        key: as in `FlowWeightedDataset`.
        missing: ``"raise"`` refuses samples without a loss, ``"zero"`` gives them weight 0.
        resample: yield samples without a weight, each with the probability that is its weight;
            the training loop's loss then stays as it is.
        num_replicas: number of ranks, each of which reads the whole source and yields its share.
        rank: this rank's number among them.
        seed: of resampling.

    Raises:
        TypeError, ValueError: an argument is not as above; while iterating, a loss is missing,
            or a median is 0.

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
            if isinstance(temperature, str) or callable(temperature):
                raise ValueError(
                    "temperature of a stream must be 'running_median', 'batch_median' or a "
                    f"positive float, got {temperature!r}"
                )
            temperature = positive_number(temperature)
        check_natural("window", window, least=1)
        check_natural("seed", seed)
        if missing not in ("raise", "zero"):
            raise ValueError(f"missing must be 'raise' or 'zero', got {missing!r}")
        check_rank(rank, num_replicas)
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
        self._source = StreamSource(dataset, rank, num_replicas)
        self._attach = weight_attacher(layout, key)
        self._score_options = _options_of_one_rank(scorer)
        self._temperatures = WindowTemperature(temperature)
        self._rewind()

    @property
    def dataset(self) -> Any:
        """The source; a torchdata node stands in its `Loader`."""
        return self._source.dataset

    def __iter__(self) -> Iterator[Any]:
        """Iterate over the samples; the first pass after loading a state goes on there."""
        if self._in_pass:
            self._rewind()  # from wherever an earlier pass stopped
        self._in_pass = True
        return self._iterate()

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch, which resampling depends on, and the source's where it has epochs."""
        if hasattr(self.dataset, "set_epoch"):
            self.dataset.set_epoch(epoch)
        if epoch != self.epoch:
            self.epoch = epoch
            self._rewind()

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
        Hugging Face shuffle buffer is refilled with other samples).
        """
        return {
            **self._identity(),
            "epoch": self.epoch,
            **self._source.state_dict(),
            "in_use": _as_plain_data(self._window_temperature),
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
        self.set_epoch(state_dict["epoch"])
        self._source.load_state_dict(state_dict)
        self._window_temperature, self._index = state_dict["in_use"], state_dict["yielded"]
        self._in_pass, self._at_end = False, state_dict["ended"]
        self._temperatures.load_state_dict(state_dict)

    def _identity(self) -> dict[str, Any]:
        """What a state must share with the stream that loads it."""
        return {
            "version": _VERSION,
            "temperature": _as_plain_data(self.temperature),
            "window": self.window,
            "resample": self.resample,
            "seed": self.seed,
            "share": list(self._source.share()),
        }

    def _rewind(self) -> None:
        """Let the next pass begin at the start of the source."""
        self._source.rewind()
        self._window_temperature, self._index = None, 0
        self._in_pass = self._at_end = False

    def _iterate(self) -> Iterator[Any]:
        if self._at_end:
            return
        samples = self._source.samples()
        while window := list(islice(samples, self.window)):
            yield from self._rest_of(window)
            # The source moves on only after the window's last sample: until then a state has to
            # lead back to the window's start.
            self._source.advance(len(window))
            self._window_temperature, self._index = None, 0
        self._at_end = True

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
        scores = self.scorer.score(
            window, collate_fn=self.collate_fn, dataset_id="window", **self._score_options
        )
        losses = scores.losses.detach().cpu()
        present = losses.isfinite()
        if self.missing == "raise" and not present.all():
            first = self._source.position + int((~present).int().argmax())
            raise ValueError(
                f"sample {first} of the stream has no loss (no target, or a non-finite loss); drop "
                "such samples from the source, or pass missing='zero' to give them weight 0"
            )
        weights = torch.zeros(len(losses))
        if present.any():
            # The state of a resumed window brings its temperature and a median that has counted
            # its losses: to count them again would double them.
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


def _as_plain_data(temperature: str | float | None) -> str | float | None:
    """A temperature as a state holds it: a number of a type that any reader of states knows."""
    return float(temperature) if isinstance(temperature, float) else temperature


def _options_of_one_rank(scorer: Scorer) -> dict[str, Any]:
    """The options of `score` that let a scorer work on this rank without the others.

    Inside a process group a `LossScorer` shares its work among the ranks, all of which have to call
    it with the same samples. Here every rank scores different windows at its own pace, so sharing
    is turned off. A scorer whose `score` has no argument `shared` does not share.
    """
    parameters = inspect.signature(scorer.score).parameters
    takes_any = any(p.kind is inspect.Parameter.VAR_KEYWORD for p in parameters.values())
    return {"shared": False} if "shared" in parameters or takes_any else {}
