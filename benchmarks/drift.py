"""What measuring drift costs in training: python -m benchmarks drift [--tiny] [--tasks …] …

A step of training and one measurement take turns. The share that is printed is that of one
measurement in a hundred steps. Before anything is timed, the drift of a model from itself is 0, and
that of another from it the KL of full logits, by hand, in float64.
"""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from benchmarks import rows
from benchmarks.forgetting.images import resnet20
from flowdata.drift import DriftMeter, smooth_images

_EVERY = 100  # steps


@dataclass(frozen=True)
class Task:
    """A model in training, and what its drift is measured on.

    Attributes:
        model: in training mode, on its device.
        probe: of the meter.
        batch: of a step.
        loss: of the model and the batch.
        logits: those of a sample of the probe, (n, C).
    """

    model: nn.Module
    probe: Any
    batch: Any
    loss: Callable[[nn.Module, Any], Tensor]
    logits: Callable[[nn.Module, Any], Tensor]


def main(argv: list[str]) -> None:
    """Measure every task, print the shares, and write the rows."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--tasks", nargs="+", default=list(TASKS), choices=list(TASKS))
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--layers", type=int, default=30, help="of the language model (576 wide)")
    parser.add_argument("--tiny", action="store_true", help="a few seconds, for correctness")
    parser.add_argument("--device", default="cuda" if torch.cuda.is_available() else "cpu")
    options = parser.parse_args(argv)
    results = []
    for name in options.tasks:
        for row in measure(name, options):
            print(rows.line(row), flush=True)
            results.append(row)
    if not options.tiny:
        print(rows.write("drift", results, " ".join(["python -m benchmarks drift", *argv])))


def measure(name: str, options: argparse.Namespace) -> list[dict[str, Any]]:
    """Return a task's rows: a step, a measurement, and the latter's share of a hundred steps.

    Args:
        name: one of `TASKS`.
        options: `repeats`, `layers`, `tiny` and `device`, as on the command line.
    """
    task = TASKS[name](options)
    meter = DriftMeter(task.model, task.probe)
    check(meter, task)
    optimizer = torch.optim.AdamW(task.model.parameters(), 1e-5)

    def step() -> None:
        task.loss(task.model, task.batch).backward()
        optimizer.step()
        optimizer.zero_grad()
        rows.now(options.device)

    def measurement() -> None:
        meter(task.model)
        rows.now(options.device)

    runs = {"step": step, "measurement": measurement}
    seconds = rows.timed_in_turn(runs, options.repeats, warmup=1)
    pairs = zip(seconds["measurement"], seconds["step"], strict=True)
    shares = [100 * one / (_EVERY * other + one) for one, other in pairs]
    more = {"device": options.device, "dtype": str(meter.reader.dtype).removeprefix("torch.")}
    share = f"{name}: drift at one evaluation in {_EVERY} steps"
    return [
        *(rows.row(f"{name}: {kind}", values, "s", **more) for kind, values in seconds.items()),
        rows.row(share, shares, "% of training", **more),
    ]


def check(meter: DriftMeter, task: Task) -> None:
    """Exit unless the drift is right: of the model itself 0, of another that of full logits."""
    if meter(task.model).kl != 0:
        raise SystemExit("a model has drifted from itself")
    other = copy.deepcopy(task.model)
    with torch.no_grad():
        for parameter in other.parameters():
            parameter.add_(0.02 * parameter.std().nan_to_num() * torch.randn_like(parameter))
    drift = meter(other, batch_norm="own")
    values = []
    for place in range(2):
        p, q = (_logits(task, model, place).log_softmax(1) for model in (task.model, other))
        values.append(float((p.exp() * (p - q)).sum(1).mean()))
    found = drift.per_sample["kl"][:2].tolist()
    leeway = 1e-3 if meter.reader.dtype == torch.float32 else 0.1
    if any(abs(a - b) > leeway * b + 1e-6 for a, b in zip(found, values, strict=True)):
        raise SystemExit(f"drifts of {found} nats, and by full logits {values}")


def _logits(task: Task, model: nn.Module, place: int) -> Tensor:
    was_training = model.training
    with torch.no_grad():
        logits = task.logits(model.eval(), task.probe[place])
    model.train(was_training)
    return logits.double()


def _language(options: argparse.Namespace) -> Task:
    """A model of SmolLM2-135M's shape, 8 texts of 256 tokens a step; 64 texts of 128 as probe."""
    from transformers import LlamaConfig, LlamaForCausalLM

    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=512 if options.tiny else 49152,
        hidden_size=64 if options.tiny else 576,
        intermediate_size=128 if options.tiny else 1536,
        num_hidden_layers=2 if options.tiny else options.layers,
        num_attention_heads=2 if options.tiny else 9,
        num_key_value_heads=1 if options.tiny else 3,
        tie_word_embeddings=True,
    )
    model = LlamaForCausalLM(config).to(options.device).train()
    sizes = ((2, 16), (8, 16)) if options.tiny else ((8, 256), (64, 128))
    batch, texts = (torch.randint(3, config.vocab_size, size) for size in sizes)
    return Task(
        model,
        [{"input_ids": text, "labels": text} for text in texts],
        batch.to(options.device),
        lambda model, ids: model(input_ids=ids, labels=ids).loss,
        lambda model, text: model(text["input_ids"][None].to(options.device)).logits[0, :-1],
    )


def _vision(options: argparse.Namespace) -> Task:
    """A ResNet-20, 128 images of 32 × 32 a step; 512 of smooth noise as probe."""
    torch.manual_seed(0)
    images = torch.randn(8 if options.tiny else 128, 3, 32, 32)
    labels = torch.randint(10, (len(images),))
    return Task(
        resnet20().to(options.device).train(),
        smooth_images((3, 32, 32), samples=16 if options.tiny else 512),
        (images.to(options.device), labels.to(options.device)),
        lambda model, batch: F.cross_entropy(model(batch[0]), batch[1]),
        lambda model, image: model(image[None].to(options.device)),
    )


TASKS = {"language model": _language, "resnet-20": _vision}
