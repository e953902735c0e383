"""The whole idea in a minute: a network that reads upright digits learns to read them turned.

The demo compares standard fine-tuning with FLOW on scikit-learn's 8×8 scans of handwritten digits,
over several seeds and learning rates. FLOW follows the paper's recipe for a task with a head of its
own, see `flowdata.study.recipe`. Standard fine-tuning starts from the same probed head, and is
measured with the head that it has trained. Each method's learning rate is the best one on held-out
samples of the *new* task, as somebody without the old data has to choose it; the table shows the
other rates as well.
"""

from __future__ import annotations

import copy
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader, TensorDataset

from flowdata._common.progress import progress_bar
from flowdata._common.rng import preserved_rng
from flowdata.cli.demo_picture import draw_demo
from flowdata.cli.demo_result import FLOW, STANDARD, DemoResult, Outcome, Start
from flowdata.dataset import FlowWeightedDataset
from flowdata.losses import weighted_mean
from flowdata.report.pictures import figure, png
from flowdata.study.recipe import as_old_network, begin, fit_new_head
from flowdata.weights import flow_weights, resolve_temperature

RATES = (0.01, 0.03, 0.1, 0.3)
_WIDTH, _BATCH, _EPOCHS, _PRETRAINING_EPOCHS = 64, 32, 20, 30
# The probe's penalty is a strong one: under a weak one the head would fit so few samples exactly,
# and their losses, which make the weights, would all be close to 0.
_PROBE_STRENGTH = 0.03


def run_demo(output: str | Path, *, seeds: int = 5, progress: bool = True) -> DemoResult:
    """Run the comparison, draw it into the PNG `output` and return what was measured.

    Args:
        output: path of the picture.
        seeds: number of repetitions, each with a split, a start and an order of its own.
        progress: whether to show a bar.

    Raises:
        ImportError: scikit-learn or matplotlib is not installed.
        ValueError: `seeds` is not positive.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    images, labels = _digits()
    # The figure is opened first, so that a missing matplotlib is reported before the training.
    with figure(10.5, 4.3, panels=2) as (drawing, (left, right)):
        result = DemoResult(*_measure(images, labels, seeds, progress), Path(output))
        draw_demo(left, right, result)
        result.picture.parent.mkdir(parents=True, exist_ok=True)
        result.picture.write_bytes(png(drawing))
    return result


def _measure(
    images: Tensor, labels: Tensor, seeds: int, progress: bool
) -> tuple[list[Start], list[Outcome]]:
    starts, outcomes = [], []
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that a second thread would only wait
    try:
        runs = seeds * (1 + 2 * len(RATES))
        with progress_bar(runs, "demo", "training runs", shown=progress) as advance:
            for seed in range(seeds):
                with preserved_rng(seed):
                    tasks = _split(images, labels)
                    old, probed_network, start = _pretrain_and_probe(seed, tasks)
                    starts.append(start)
                    advance(1)
                    for method in (STANDARD, FLOW):
                        for rate in RATES:
                            outcomes.append(
                                _fine_tune(method, rate, old, probed_network, start, tasks)
                            )
                            advance(1)
    finally:
        torch.set_num_threads(threads)
    return starts, outcomes


@dataclass(frozen=True)
class _Tasks:
    """The data sets of both tasks: digits are upright in the old one and turned in the new one.

    Attributes:
        old_train: for pre-training.
        old_test: measures what is forgotten.
        train: for fine-tuning on the new task.
        held_out: of the new task; the learning rate is chosen by it.
        test: measures what is learned of the new task.
    """

    old_train: TensorDataset
    old_test: TensorDataset
    train: TensorDataset
    held_out: TensorDataset
    test: TensorDataset


def _pretrain_and_probe(seed: int, tasks: _Tasks) -> tuple[nn.Sequential, nn.Sequential, Start]:
    """Return the pre-trained network, its body with a probed head, and the figures of both."""
    body = nn.Sequential(nn.Linear(64, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
    old, head = nn.Sequential(body, nn.Linear(_WIDTH, 10)), nn.Linear(_WIDTH, 10)
    _train(old, tasks.old_train, torch.ones(len(tasks.old_train)), 0.05, _PRETRAINING_EPOCHS)
    network, scores = begin(body, head, tasks.train, strength=_PROBE_STRENGTH, dtype="float32")
    start = Start(
        seed,
        _accuracy(old, tasks.old_test),
        _accuracy(network, tasks.test),
        scores.losses,
        resolve_temperature(scores.losses, "median"),
    )
    return old, network, start


def _fine_tune(
    method: str,
    rate: float,
    old: nn.Sequential,
    probed_network: nn.Sequential,
    start: Start,
    tasks: _Tasks,
) -> Outcome:
    network = copy.deepcopy(probed_network)
    weights = torch.ones(len(tasks.train)) if method == STANDARD else flow_weights(start.losses)
    _train(network, tasks.train, weights, rate, _EPOCHS)
    if method == FLOW:  # the recipe's second probe, of the head alone and without weights
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
    weighted_data = FlowWeightedDataset(data, weights)
    loader = DataLoader(weighted_data, batch_size=_BATCH, shuffle=True)
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
    """The 1,797 images, (N, 64) in [0, 1], and their digits, (N,)."""
    try:
        from sklearn.datasets import load_digits
    except ImportError:
        raise ImportError(
            'the demo needs scikit-learn: pip install "flowdata-torch[demo]"'
        ) from None
    images, labels = load_digits(return_X_y=True)
    return torch.tensor(images / 16, dtype=torch.float32), torch.tensor(labels)


def _split(images: Tensor, labels: Tensor) -> _Tasks:
    """Split the images at random: half for training, a fifth held out, the rest for tests."""
    order = torch.randperm(len(images))
    turned_images = images.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
    train, held_out, test = order.tensor_split((len(order) // 2, len(order) * 7 // 10))
    return _Tasks(
        TensorDataset(images[train], labels[train]),
        TensorDataset(images[test], labels[test]),
        TensorDataset(turned_images[train], labels[train]),
        TensorDataset(turned_images[held_out], labels[held_out]),
        TensorDataset(turned_images[test], labels[test]),
    )
