"""What would my model forget? `flowdata.study` on a model and data of yours.

    python -m examples.measure_forgetting [--methods standard FLOW l2 "FLOW + l2"] [--seeds 3]

Replace `load` by your own: it gives the pre-trained model, what to train on, what to choose the
learning rate by, and the tests of the new task and of an old one. Here a network that was trained
on upright digits learns them turned by a quarter. The drift, which needs no old data, is measured
too, so that the page says what it would choose beside the blind choice. Every run is a line of
`--output`.jsonl, so a study that was stopped goes on; table and picture are written beside it.
"""

from __future__ import annotations

import argparse
import copy
from functools import lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple

import torch
from torch import nn
from torch.utils.data import Subset

import flowdata
from examples.custom_loop import pretrain
from flowdata.study import (
    METHODS,
    Record,
    accuracy,
    draw_picture,
    fine_tune,
    grids,
    report,
    run_study,
    sample_weights,
)


class Task(NamedTuple):
    """A model with what it is to learn and what it should not forget."""

    model: nn.Module
    meter: flowdata.DriftMeter
    train: Any
    validation: Any
    test: Any
    old_test: Any


@lru_cache
def load(seed: int) -> Task:
    """Yours: the data are map-style, samples (input, class); the model gives logits."""
    model, old, new = pretrain()
    order = torch.randperm(len(new), generator=torch.Generator().manual_seed(seed))
    parts = [Subset(new, part.tolist()) for part in order.tensor_split((900, 1200))]
    return Task(model, flowdata.DriftMeter(model, parts[0]), *parts, old)


def run(name: str, rate: float, seed: int, epochs: int) -> Record:
    """Fine-tune by a method, and measure."""
    task, method = load(seed), METHODS[name]
    scores = flowdata.LossScorer(task.model, progress=False).score(task.train)
    model, weights = copy.deepcopy(task.model), sample_weights(method, scores)
    fine_tune(model, task.train, weights, method, rate=rate, seed=seed, epochs=epochs, batch=32)
    return {
        "validation": accuracy(model, task.validation),
        "target": {"accuracy": accuracy(model, task.test)},
        "retained": {"old accuracy": accuracy(model, task.old_test)},
        "drift": {"new task": task.meter(model).to_dict()},  # by the probe's name
        "effective_share": flowdata.effective_sample_size(weights) / len(weights),
    }


def main(argv: list[str] | None = None) -> str:
    """Run the study, print its page and return it."""
    parser = argparse.ArgumentParser(description="What would my model forget?")
    parser.add_argument("--methods", nargs="+", default=["standard", "FLOW", "l2", "FLOW + l2"])
    parser.add_argument("--rates", nargs="+", type=float, default=[0.01, 0.03, 0.1])
    parser.add_argument("--seeds", type=int, default=3)
    parser.add_argument("--epochs", type=int, default=10)
    parser.add_argument("--output", type=Path, default=Path("runs/my_study"))
    arguments = parser.parse_args(argv)
    options = {"study": "digits", "target": "turned digits", "epochs": arguments.epochs}
    records = run_study(
        arguments.output.with_suffix(".jsonl"),
        options,
        partial(run, epochs=arguments.epochs),
        methods=grids(arguments.methods, arguments.rates),
        seeds=range(arguments.seeds),
    )
    page = report(options, records)
    arguments.output.with_suffix(".md").write_text(page)
    arguments.output.with_suffix(".png").write_bytes(draw_picture(records))
    print(page)
    return page


if __name__ == "__main__":
    main()
