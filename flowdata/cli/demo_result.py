"""The demo's measurements, and their table."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from statistics import mean, stdev
from typing import Any

from torch import Tensor

STANDARD, FLOW = "standard fine-tuning", "FLOW"


@dataclass(frozen=True)
class Outcome:
    """Accuracies in % after one fine-tuning run.

    Attributes:
        method: `STANDARD` or `FLOW`.
        learning_rate: the highest one of its schedule.
        seed: the run's.
        old: accuracy on the old task's test samples.
        new: accuracy on the new task's test samples.
        held_out: accuracy on the samples of the new task that the learning rate is chosen by.
    """

    method: str
    learning_rate: float
    seed: int
    old: float
    new: float
    held_out: float


@dataclass(frozen=True)
class Start:
    """The figures of one seed before fine-tuning.

    Attributes:
        seed: the run's.
        old: accuracy in % of the pre-trained network on the old task.
        probe: accuracy in % of the probed network on the new task.
        losses: (N,) losses of the new task's training samples under the probed network, nats.
        temperature: their median, nats.
    """

    seed: int
    old: float
    probe: float
    losses: Tensor
    temperature: float


@dataclass(frozen=True)
class DemoResult:
    """All measurements of the demo; `str()` gives the table.

    Attributes:
        starts: one for each seed.
        outcomes: one for each method, learning rate and seed.
        picture: path of the PNG.
    """

    starts: list[Start]
    outcomes: list[Outcome]
    picture: Path

    @property
    def rates(self) -> list[float]:
        """The learning rates of the runs, the smallest first."""
        return sorted({outcome.learning_rate for outcome in self.outcomes})

    def learning_rate(self, method: str) -> float:
        """Return the rate with the best held-out accuracy on the new task."""
        return max(self.rates, key=lambda rate: mean(o.held_out for o in self.runs(method, rate)))

    def runs(self, method: str, rate: float) -> list[Outcome]:
        """Return a method's runs at a rate, one for each seed."""
        return [o for o in self.outcomes if (o.method, o.learning_rate) == (method, rate)]

    def to_dict(self) -> dict[str, Any]:
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
            for rate in self.rates:
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


def _row(name: str, old: list[float], new: list[float] | None = None) -> str:
    if new is None:
        return _row_of([_spread(old)], name)
    average = [(a + b) / 2 for a, b in zip(old, new, strict=True)]
    return _row_of([_spread(values) for values in (old, new, average)], name)


def _row_of(cells: list[str], name: str = "") -> str:
    return f"{name:40}" + "".join(f"{cell:>14}" for cell in cells)


def _spread(values: list[float], form: str = ".1f") -> str:
    return f"{mean(values):{form}} ± {stdev(values) if len(values) > 1 else 0.0:{form}}"
