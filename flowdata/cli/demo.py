"""The whole idea in a minute: a network that reads upright digits learns to read them turned.

Standard fine-tuning against FLOW on scikit-learn's 8×8 scans of handwritten digits, over several
seeds and learning rates. The recipe is the paper's for a task with a head of its own: probe the
new head, score, weigh, fine-tune, fit the head once more; the old head then shows what is left.
Each method's learning rate is the best one on held-out samples of the *new* task, as somebody
without the old data has to choose it; what every other rate gives is told as well.
"""

from __future__ import annotations

import copy
from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flowdata._common.progress import progress_bar
from flowdata._common.rng import preserved_rng
from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import weighted_mean
from flowdata.report.pictures import BLUE, GREEN, draw_losses, figure, png
from flowdata.study.recipe import as_old_network, begin, fit_new_head
from flowdata.weights import flow_weights, resolve_temperature

STANDARD, FLOW = "standard fine-tuning", "FLOW"
RATES = (0.01, 0.03, 0.1, 0.3)
_WIDTH, _BATCH, _EPOCHS, _PRETRAINING_EPOCHS = 64, 32, 20, 30
_PROBE_STRENGTH = 0.03  # firm: on so few samples a weak penalty takes all losses towards 0


@dataclass(frozen=True)
class Outcome:
    """Accuracies in % after one fine-tuning run, `held_out` on new-task samples apart."""

    method: str
    learning_rate: float
    seed: int
    old: float
    new: float
    held_out: float


@dataclass(frozen=True)
class Start:
    """What one seed began with: accuracies in % and the losses under the probed network."""

    seed: int
    old: float
    probe: float
    losses: Tensor
    temperature: float


@dataclass(frozen=True)
class DemoResult:
    """All that the demo measured; `str()` gives the table."""

    starts: list[Start]
    outcomes: list[Outcome]
    picture: Path

    def learning_rate(self, method: str) -> float:
        """Return the rate with the best held-out accuracy on the new task."""
        return max(RATES, key=lambda rate: mean(o.held_out for o in self.runs(method, rate)))

    def runs(self, method: str, rate: float) -> list[Outcome]:
        """Return a method's runs at a rate, one for each seed."""
        return [o for o in self.outcomes if (o.method, o.learning_rate) == (method, rate)]

    def as_dict(self) -> dict[str, Any]:
        """Return the figures, JSON-like."""
        starts = [asdict(start) for start in self.starts]
        for start in starts:
            del start["losses"]
        return {
            "starts": starts,
            "outcomes": [asdict(outcome) for outcome in self.outcomes],
            "chosen": {method: self.learning_rate(method) for method in (STANDARD, FLOW)},
            "picture": str(self.picture),
        }

    def __str__(self) -> str:
        old = [start.old for start in self.starts]
        lines = [
            "Upright digits first (old task), then turned by a quarter (new task). Accuracy in %,"
            f"\nmean ± standard deviation of {len(self.starts)} seeds:",
            "",
            _row_of(["old task", "new task", "average"]),
            _row("pre-trained", old),
            _row("linear probe", old, [start.probe for start in self.starts]),
        ]
        for method in (STANDARD, FLOW):
            for rate in RATES:
                runs = self.runs(method, rate)
                mark = " (chosen)" if rate == self.learning_rate(method) else ""
                name = f"{method}, rate {rate:g}{mark}"
                lines.append(_row(name, [o.old for o in runs], [o.new for o in runs]))
        lines += [
            "",
            "The rate chosen is each method's best on held-out samples of the new task.",
            "Temperature: the median of the losses under the probed network, "
            f"{_spread([s.temperature for s in self.starts], '.3f')} nats.",
            f"Picture: {self.picture}",
        ]
        return "\n".join(lines)


def run_demo(output: str | Path, *, seeds: int = 5, progress: bool = True) -> DemoResult:
    """Run the comparison, draw it into the PNG `output` and return what was measured.

    Args:
        output: path of the picture.
        seeds: how often all is repeated, with another split, start and order each time.
        progress: shows a bar.

    Raises:
        ImportError: scikit-learn or matplotlib is not installed.
        ValueError: `seeds` is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    with figure(10.5, 4.3, panels=2) as (drawing, (left, right)):
        starts, outcomes = _measure(seeds, progress)
        result = DemoResult(starts, outcomes, Path(output))
        _draw_trade_off(left, result)
        draw_losses(right, starts[0].losses, starts[0].temperature)
        right.set_title("Losses of the new task (first seed)")
        result.picture.parent.mkdir(parents=True, exist_ok=True)
        result.picture.write_bytes(png(drawing))
    return result


def _measure(seeds: int, progress: bool) -> tuple[list[Start], list[Outcome]]:
    images, labels = _digits()
    starts, outcomes = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that a second thread only waits
    try:
        runs = seeds * (1 + 2 * len(RATES))
        with progress_bar(runs, "demo", "training runs", shown=progress) as advance:
            for seed in range(seeds):
                with preserved_rng(seed):
                    tasks = _split(images, labels)
                    old, probed, start = _pretrain_and_probe(seed, tasks)
                    starts.append(start)
                    advance(1)
                    for method in (STANDARD, FLOW):
                        for rate in RATES:
                            outcomes.append(_fine_tune(method, rate, old, probed, start, tasks))
                            advance(1)
    finally:
        torch.set_num_threads(threads)
    return starts, outcomes


@dataclass(frozen=True)
class _Tasks:
    old_train: TensorDataset
    old_test: TensorDataset
    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset


def _pretrain_and_probe(seed: int, tasks: _Tasks) -> tuple[nn.Sequential, nn.Sequential, Start]:
    """Return the network as pre-trained, the same with the probed head, and what they reach."""
    body = nn.Sequential(nn.Linear(64, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
    old, head = nn.Sequential(body, nn.Linear(_WIDTH, 10)), nn.Linear(_WIDTH, 10)
    _train(old, tasks.old_train, torch.ones(len(tasks.old_train)), 0.05, _PRETRAINING_EPOCHS)
    network, scores = begin(body, head, tasks.train, strength=_PROBE_STRENGTH, dtype="float32")
    return (
        old,
        network,
        Start(
            seed,
            _accuracy(old, tasks.old_test),
            _accuracy(network, tasks.test),
            scores.losses,
            resolve_temperature(scores.losses, "median"),
        ),
    )


def _fine_tune(
    method: str,
    rate: float,
    old: nn.Sequential,
    probed: nn.Sequential,
    start: Start,
    tasks: _Tasks,
) -> Outcome:
    network = copy.deepcopy(probed)
    weights = torch.ones(len(tasks.train))
    if method == FLOW:
        weights = flow_weights(start.losses, temperature="median")
    _train(network, tasks.train, weights, rate, _EPOCHS)
    if method == FLOW:  # the second round: the head alone, without weights
        fit_new_head(network, tasks.train, strength=_PROBE_STRENGTH, dtype="float32")
    return Outcome(
        method,
        rate,
        start.seed,
        old=_accuracy(as_old_network(network, old), tasks.old_test),
        new=_accuracy(network, tasks.test),
        held_out=_accuracy(network, tasks.held_out),
    )


def _train(
    model: nn.Module, data: TensorDataset, weights: Tensor, rate: float, epochs: int
) -> None:
    """Minimise the weighted loss by SGD with momentum and a cosine schedule."""
    weighted = FlowWeightedDataset(data, weights)
    loader = DataLoader(weighted, batch_size=_BATCH, shuffle=True)
    optimizer = torch.optim.SGD(model.parameters(), lr=rate, momentum=0.9, weight_decay=5e-4)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, epochs * len(loader))
    for _ in range(epochs):
        for (images, labels), weight in loader:
            losses = F.cross_entropy(model(images), labels, reduction="none")
            loss = weighted_mean(losses, weight)
            optimizer.zero_grad()
            loss.backward()
            optimizer.step()
            schedule.step()


@torch.no_grad()
def _accuracy(model: nn.Module, data: TensorDataset) -> float:
    images, labels = data.tensors
    return float(100 * (model(images).argmax(1) == labels).float().mean())


def _digits() -> tuple[Tensor, Tensor]:
    """1,797 images, (N, 64) in [0, 1], and their digits."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            'the demo needs scikit-learn: pip install "flowdata-torch[demo]"'
        ) from None
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def _split(images: Tensor, labels: Tensor) -> _Tasks:
    """Half to train on, a fifth to choose the learning rate, the rest to test, on both tasks."""
    order = torch.randperm(len(images))

    turned = images.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    train, held_out, test = order.tensor_split((len(order) // 2, len(order) * 7 // 10))
    return _Tasks(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        TensorDataset(turned[train], labels[train]),
        TensorDataset(turned[held_out], labels[held_out]),
        TensorDataset(turned[test], labels[test]),
    )


def _draw_trade_off(axes: Any, result: DemoResult) -> None:
    """Old against new accuracy: every run, and each method's path over the learning rates."""
    for method, colour in ((STANDARD, BLUE), (FLOW, GREEN)):
        middles = []
        for rate in RATES:
            runs = result.runs(method, rate)
            is_chosen = rate == result.learning_rate(method)
            axes.scatter(
                [o.new for o in runs],
                [o.old for o in runs],
                s=26 if is_chosen else 12,
                color=colour,
                alpha=0.9 if is_chosen else 0.35,
                linewidths=0,
                label=f"{method}, rate {rate:g} (chosen)" if is_chosen else None,
            )
            middles.append((mean(o.new for o in runs), mean(o.old for o in runs)))
        axes.plot(*zip(*middles, strict=True), color=colour, linewidth=1, alpha=0.5)
        for rate, middle in zip(RATES, middles, strict=True):
            axes.annotate(
                f"{rate:g}",
                middle,
                color=colour,
                fontsize=9,
                xytext=(5, 4),
                textcoords="offset points",
            )
    old, probe = mean(s.old for s in result.starts), mean(s.probe for s in result.starts)
    axes.scatter([probe], [old], marker="*", s=110, color="#9aa2b1", label="linear probe")
    axes.set(
        title="What was learned and what was kept",
        xlabel="accuracy on the new task (%)",
        ylabel="accuracy on the old task (%)",
        xlim=(probe - 5, 100),  # what learned less than the probe did has diverged
    )
    axes.grid(True, axis="both")
    axes.legend(loc="lower left", fontsize=9)


def _row(name: str, old: list[float], new: list[float] | None = None) -> str:
    if new is None:
        return _row_of([_spread(old)], name)
    average = [(a + b) / 2 for a, b in zip(old, new, strict=True)]
    return _row_of([_spread(values) for values in (old, new, average)], name)


def _row_of(cells: list[str], name: str = "") -> str:
    return f"{name:40}" + "".join(f"{cell:>14}" for cell in cells)


def _spread(values: list[float], form: str = ".1f") -> str:
    return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else 0.0:{form}}"
