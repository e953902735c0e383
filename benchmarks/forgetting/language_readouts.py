"""What is measured of a fine-tuned language model: losses of texts, drift, and drift's rivals.

The drift needs no text of others: the frozen model writes its probe itself. The weights' distance
and the gradient of the validation loss are what somebody without a probe could look at instead.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from benchmarks.forgetting.batches import Weighted, batch_loss, collate
from flowdata import LossScorer
from flowdata.drift import Drift, DriftMeter, own_text
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.text import TokenSamples

_TOKENS_OF_OWN_TEXT = 96
_GRADIENT_SAMPLES, _GRADIENT_BATCH = 8, 4
DTYPE = "bfloat16"  # of the drift in these studies
OWN_TEXT, AFTER_BOS, VALIDATION = "own text", "own text after BOS", "validation targets"


class DriftReadout:
    """The drift of fine-tuned models by each probe.

    Args:
        model: the frozen model.
        tokenizer: its tokenizer.
        samples: number of texts that it writes after the beginning of a chat; half as many are
            those after the token that begins any text.
        folder: keeps the texts.
    """

    def __init__(self, model: Any, tokenizer: Any, samples: int, folder: Path) -> None:
        kinds = {OWN_TEXT: (True, samples), AFTER_BOS: (False, -(-samples // 2))}
        self.meters, self.counts = {}, {}
        for name, (template, number) in kinds.items():
            file = folder / f"{name.replace(' ', '_')}.safetensors"
            probe = own_text(
                model, tokenizer, number, _TOKENS_OF_OWN_TEXT, template=template, store=file
            )
            self.meters[name] = DriftMeter(model, probe, dtype=DTYPE)
            self.counts[name] = torch.tensor(
                [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in probe]
            )

    def __call__(self, model: nn.Module, validation: DriftMeter) -> dict[str, Any]:
        """Return ``drift`` by probe, and ``drift on few``: that on the first texts of its own.

        Args:
            model: a fine-tuned model.
            validation: a meter on the new task's validation samples.
        """
        drifts = {name: meter(model) for name, meter in self.meters.items()}
        few = {name: of_few(drifts[name], counts) for name, counts in self.counts.items()}
        drifts[VALIDATION] = validation(model)
        return {
            "drift": {name: _rounded(drift.to_dict()) for name, drift in drifts.items()},
            "drift on few": few,
        }


def of_few(drift: Drift, counts: Tensor) -> dict[str, dict[str, float]]:
    """Return the drift on a probe's first 4, 8, 16, … samples, fewer than all, by how many.

    Args:
        drift: measured on the whole probe.
        counts: (N,) targets of each sample.

    Example:
        >>> kl = {"kl": torch.tensor([1.0, 1.0, 1.0, 2.0, 5.0])}
        >>> drift = Drift(2.0, 2.0, 1.0, 1.0, 5, head="own", of="tokens", per_sample=kl)
        >>> of_few(drift, torch.tensor([3, 3, 3, 1, 1]))
        {'4': {'kl': 1.1}}
    """
    measures = {name: each for name, each in drift.per_sample.items() if name != "targets"}
    sums = {name: (values * counts).cumsum(0) for name, values in measures.items()}
    sizes = [2**power for power in range(2, 12) if 2**power < len(counts)]
    return {
        str(size): {
            name: _short(float(sums[name][size - 1] / counts[:size].sum())) for name in sums
        }
        for size in sizes
    }


def item_losses(model: nn.Module, sets: Sequence[TokenSamples]) -> list[tuple[Tensor, Tensor]]:
    """Return each set's losses in nats a token, (N,), and counts of tokens, of a bfloat16 copy."""
    scorer = LossScorer(model, "causal_lm", dtype="bfloat16", compile=False, progress=False)
    scores = [scorer.score(samples, dataset_id=samples.digest()) for samples in sets]
    return [(each.losses.double(), each.counts) for each in scores]


def mean_loss(losses: Tensor, counts: Tensor) -> float:
    """Return the mean loss of all tokens of a set, see `item_losses`."""
    return float((losses * counts).sum() / counts.sum())


def short_list(losses: Tensor) -> list[float]:
    """Return the losses of single items as a record keeps them, to four decimals."""
    return [round(loss, 4) for loss in losses.tolist()]


def rivals(
    model: nn.Module, base: nn.Module, validation: TokenSamples, loss: float
) -> dict[str, float]:
    """Return what else might tell forgetting: distance of the weights, loss, gradient norm.

    Args:
        model: a fine-tuned model; no gradient is left in it.
        base: the frozen model.
        validation: the new task's samples, the first 8 of which give the gradient.
        loss: the validation loss.
    """
    return {
        "weight distance": _weight_distance(model, base),
        "validation loss": loss,
        "gradient norm": _gradient_norm(model, validation),
    }


def _weight_distance(model: nn.Module, base: nn.Module) -> float:
    pairs = zip(model.parameters(), base.parameters(), strict=True)
    with torch.no_grad():
        return math.sqrt(sum(float((p - q).double().square().sum()) for p, q in pairs))


def _gradient_norm(model: nn.Module, samples: TokenSamples) -> float:
    few = [samples[index] for index in range(min(_GRADIENT_SAMPLES, len(samples)))]
    counts = [int((sample["labels"] != IGNORE_INDEX).sum()) for sample in few]
    rows = Weighted(few, [torch.ones(count) for count in counts])
    model.requires_grad_(True).zero_grad()
    for start in range(0, len(rows), _GRADIENT_BATCH):
        places = range(start, min(start + _GRADIENT_BATCH, len(rows)))
        share = sum(counts[place] for place in places) / sum(counts)
        (share * batch_loss(model, collate([rows[place] for place in places]))).backward()
    norm = math.sqrt(
        sum(float(p.grad.double().square().sum()) for p in model.parameters() if p.grad is not None)
    )
    model.zero_grad()
    return norm


def _rounded(values: dict[str, Any]) -> dict[str, Any]:
    return {name: _short(v) if isinstance(v, float) else v for name, v in values.items()}


def _short(value: float) -> float:
    """A number to six significant digits: a record is read by people too."""
    return float(f"{value:.6g}")
