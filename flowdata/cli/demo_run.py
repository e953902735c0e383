"""The whole idea in a minute: a network that reads upright digits learns to read them turned.

The demo fine-tunes on scikit-learn's 8×8 scans of handwritten digits, at several learning rates and
over several seeds, in two cases:

    wrong    a third of the new labels are wrong: does FLOW help beyond smaller steps?
    right    all are right: which rate would somebody choose, with the old data and without?

All methods follow one recipe, see `flowdata.study.recipe`: they begin from one probed head, and it
is fitted once more on the body that they made.
"""

from __future__ import annotations

from pathlib import Path
from statistics import mean

import torch
from torch import Tensor, nn
from torch.utils.data import TensorDataset

from flowdata._common.progress import progress_bar
from flowdata._common.rng import preserved_rng
from flowdata.cli.demo_picture import SIZE, draw_demo
from flowdata.cli.demo_result import FLOW, MEAN_WEIGHT, OLD, RIGHT, WRONG, DemoResult
from flowdata.report.pictures import figure, png
from flowdata.study import (
    LINEAR_PROBE,
    METHODS,
    STANDARD,
    HeadTask,
    Method,
    Record,
    Sizes,
    Split,
    accuracy,
    fine_tune,
)
from flowdata.study.methods import even

RATES = (0.001, 0.003, 0.01, 0.03)
CASES = {WRONG: (STANDARD, MEAN_WEIGHT, FLOW), RIGHT: (STANDARD, FLOW)}
SHARE_OF_WRONG = 1 / 3
_WIDTH, _PRETRAINING_EPOCHS, _PRETRAINING_RATE = 64, 30, 0.05
_SIZES = Sizes(epochs=40, batch=32, dtype="float32")
# The probe's penalty is a strong one: under a weak one the head would fit so few samples exactly,
# and their losses, which make the weights, would all be close to 0.
_PROBE_STRENGTH = 0.03
_METHODS = {**METHODS, MEAN_WEIGHT: Method(even)}


def run_demo(output: str | Path, *, seeds: int = 4, progress: bool = True) -> DemoResult:
    """Run both cases, draw them into the PNG `output` and return what was measured.

    Args:
        output: path of the picture.
        seeds: number of repetitions, each with a split, a start and an order of its own.
        progress: whether to show a bar.

    Raises:
        ImportError: scikit-learn or matplotlib is not installed.
        ValueError: `seeds` is not positive, or `output` is a folder.
    """
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}")
    if Path(output).is_dir():  # told before the training
        raise ValueError(f"output must name a file, and {output} is a folder")
    images, labels = _digits()
    # The figure is opened first, so that a missing matplotlib is reported before the training.
    with figure(*SIZE, panels=2, sharey=True) as (drawing, panels):
        result = DemoResult(*_measure(images, labels, seeds, progress), Path(output))
        draw_demo(panels, result)
        result.picture.parent.mkdir(parents=True, exist_ok=True)
        result.picture.write_bytes(png(drawing))
    return result


def _measure(
    images: Tensor, labels: Tensor, seeds: int, progress: bool
) -> tuple[float, dict[str, list[Record]]]:
    """The old accuracy before fine-tuning, the mean over seeds, and the runs of each case."""
    before, records = [], {case: list[Record]() for case in CASES}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # the network is so small that a second thread would only wait
    try:
        runs = seeds * sum(1 + len(methods) * len(RATES) for methods in CASES.values())
        with progress_bar(runs, "demo", "training runs", shown=progress) as advance:
            for seed in range(seeds):
                with preserved_rng(seed):
                    tasks = _Tasks(images, labels)
                    old = _pre_trained(tasks.old_train, seed)
                    before.append(accuracy(old, tasks.old_test))
                    for case, methods in CASES.items():
                        task = _head_task(old, tasks, case)
                        for name, rate in _runs(methods):
                            key = {"method": name, "rate": rate, "seed": seed}
                            records[case].append(key | task.run(name, rate, seed))
                            advance(1)
    finally:
        torch.set_num_threads(threads)
    return mean(before), records


def _runs(methods: tuple[str, ...]) -> list[tuple[str, float]]:
    return [(LINEAR_PROBE, 0.0), *((name, rate) for name in methods for rate in RATES)]


class _Tasks:
    """The data of both tasks: digits are upright in the old one and turned in the new one.

    Half of the images are for training, a fifth is held out, and the rest is for tests.
    """

    def __init__(self, images: Tensor, labels: Tensor) -> None:
        order = torch.randperm(len(images))
        turned_images = images.reshape(-1, 8, 8).rot90(1, (1, 2)).reshape(-1, 64)
        train, held_out, test = order.tensor_split((len(order) // 2, len(order) * 7 // 10))
        self.old_train = TensorDataset(images[train], labels[train])
        self.old_test = TensorDataset(images[test], labels[test])
        self.train = TensorDataset(turned_images[train], labels[train])
        self.wrong_train = TensorDataset(turned_images[train], _with_wrong(labels[train]))
        self.held_out = TensorDataset(turned_images[held_out], labels[held_out])
        self.test = TensorDataset(turned_images[test], labels[test])

    def split(self, case: str) -> Split:
        """Return the new task's data sets in a case."""
        train = self.wrong_train if case == WRONG else self.train
        return Split(train, train, self.held_out, self.test)


def _with_wrong(labels: Tensor) -> Tensor:
    """Labels of which a share is replaced by another digit, at random."""
    wrong = torch.randperm(len(labels))[: round(SHARE_OF_WRONG * len(labels))]
    others = torch.randint(1, 10, (len(wrong),))
    return labels.index_add(0, wrong, others) % 10


def _pre_trained(data: TensorDataset, seed: int) -> nn.Sequential:
    """A body and a head that were trained on the old task."""
    body = nn.Sequential(nn.Linear(64, _WIDTH), nn.ReLU(), nn.Linear(_WIDTH, _WIDTH), nn.ReLU())
    network = nn.Sequential(body, nn.Linear(_WIDTH, 10))
    fine_tune(
        network,
        data,
        torch.ones(len(data)),
        Method(),
        rate=_PRETRAINING_RATE,
        seed=seed,
        epochs=_PRETRAINING_EPOCHS,
        batch=_SIZES.batch,
    )
    return network.eval()


def _head_task(old: nn.Sequential, tasks: _Tasks, case: str) -> HeadTask:
    return HeadTask(
        old,
        tasks.old_test,
        OLD,
        10,
        lambda seed: tasks.split(case),
        _SIZES,
        strength=_PROBE_STRENGTH,
        methods=_METHODS,
    )


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
