"""Further measures of a run of vision: other readouts of the old task, and rivals of the drift.

A body whose convolutions have changed can be read in several ways. The study's own is the old
head and the old BatchNorm, as the old task would be served. Three others say what was there to be
read: with the tuned BatchNorm, with the old parameters around statistics taken anew, and with a
head fitted anew on top of that. The last two take old samples, which no measure of drift has.
"""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import lru_cache
from statistics import mean
from typing import Any, TypeAlias

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.data import DataLoader

from flowdata import LossScorer
from flowdata.drift import Drift, DriftMeter, inverted_images, smooth_images
from flowdata.models.batch_norm import batch_norm_layers
from flowdata.study import Outcome, Record, accuracy, as_old_network, fit_new_head
from flowdata.study.hits import autocast

FEW = (16, 32, 64, 128, 256)  # samples of a probe, to see how many tell enough
SHARE_OF_HARD = 0.1  # of the new task's test samples, by the loss of the frozen network
_STRENGTH = 1e-2  # of the ℓ2 penalty of a head that is fitted anew
Measure: TypeAlias = Callable[[Outcome], Record]


def readouts(old: nn.Sequential, old_test: Any, old_train: Any, dtype: str) -> Measure:
    """Return what a `HeadTask` takes as `more`: readouts, the hard samples, drift on images made.

    Args:
        old: body and head of the old task.
        old_test: samples (input, class) of the old task to measure on.
        old_train: further such samples, to take statistics and fit heads with.
        dtype: see `Sizes`.
    """
    meters = {"inverted": _meter_on_inverted(old)}

    def more(outcome: Outcome) -> Record:
        return {
            "readouts": _old_accuracies(outcome.network, old, old_test, old_train, dtype),
            "target of the hardest tenth": _percent(outcome.hits[_hard(outcome)]),
            "target of the worst class": _worst_class(outcome),
            **drifts_on_more(outcome.network, outcome.meters, meters),
        }

    return more


@lru_cache(maxsize=1)  # the images take a minute
def _meter_on_inverted(old: nn.Sequential) -> DriftMeter:
    return DriftMeter(old, inverted_images(old, (3, 32, 32)))


def readouts_of_drift(old: nn.Sequential, old_test: Any, old_train: Any, dtype: str) -> Measure:
    """Return the same with what the study of drift compares: further probes, few samples, rivals.

    Args:
        old: see `readouts`.
        old_test: see `readouts`.
        old_train: see `readouts`.
        dtype: see `readouts`.
    """
    measure = readouts(old, old_test, old_train, dtype)
    probes = {
        "white noise": _white_noise(),
        "fine noise": smooth_images((3, 32, 32), 128, cells=12),
    }
    meters = {name: DriftMeter(old, probe) for name, probe in probes.items()}

    def more(outcome: Outcome) -> Record:
        record, by_probe = measure(outcome), "drift on other probes"
        drifts = {name: meter(outcome.network).to_dict() for name, meter in meters.items()}
        return {
            **record,
            by_probe: record[by_probe] | drifts,
            "drift on few": {name: of_few(drift) for name, drift in outcome.drifts.items()},
            "rivals": rivals(outcome, dtype),
        }

    return more


def drifts_on_more(
    network: nn.Module, own: dict[str, DriftMeter], other: dict[str, DriftMeter]
) -> Record:
    """Return the drifts that `HeadTask` doesn't measure: by the tuned BatchNorm, on other probes.

    Args:
        network: the fine-tuned network.
        own: the task's meters by the names of their probes.
        other: those on other probes.
    """
    by_own = {**own, "inverted": other["inverted"]}
    return {
        "drift by own BatchNorm": {
            name: meter(network, batch_norm="own").to_dict() for name, meter in by_own.items()
        },
        "drift on other probes": {name: meter(network).to_dict() for name, meter in other.items()},
    }


def _old_accuracies(
    network: nn.Sequential, old: nn.Sequential, old_test: Any, old_train: Any, dtype: str
) -> dict[str, float]:
    """The accuracies on the old task, in %, by the readouts beside the study's own."""
    own = accuracy(nn.Sequential(network[0], old[1]), old_test, dtype)
    body, _ = as_old_network(copy.deepcopy(network), old)
    retake_statistics(body, old_train)
    labels = old_test.tensors[1]
    with torch.no_grad(), autocast(labels.device, dtype):
        features = torch.cat([body(x) for x, _ in DataLoader(old_test, batch_size=256)]).float()
    heads = {"statistics anew": old[1]}
    if features.isfinite().all():
        heads["head anew"] = copy.deepcopy(old[1])
        fit_new_head(
            nn.Sequential(body, heads["head anew"]), old_train, strength=_STRENGTH, dtype=dtype
        )
    rest = {name: _percent(head(features).argmax(1) == labels) for name, head in heads.items()}
    return {"own BatchNorm": own, **rest}


def rivals(outcome: Outcome, dtype: str) -> dict[str, float]:
    """Return what else might tell forgetting: distance of the weights, loss, gradient norm."""
    network, start = outcome.network, outcome.beginning.network
    pairs = zip(network[0].parameters(), start[0].parameters(), strict=True)
    distance = sum(float((p.detach() - q.detach()).double().pow(2).sum()) for p, q in pairs) ** 0.5
    loss, gradient = _loss_and_gradient_norm(network, outcome.split.validation, dtype)
    return {"weight distance": distance, "validation loss": loss, "gradient norm": gradient}


def of_few(drift: Drift) -> dict[str, dict[str, float]]:
    """Return the drift on the first samples of a probe, by how many they are."""
    return {
        str(few): {
            name: round(mean(drift.per_sample[name][:few].tolist()), 4)
            for name in ("kl", "cosine", "agreement")
        }
        for few in FEW
    }


@torch.no_grad()
def retake_statistics(body: nn.Module, data: Any) -> None:
    """Replace the statistics of a body's BatchNorm layers by those of some samples, in place.

    Args:
        body: left in eval mode.
        data: samples (input, class).
    """
    for layer in batch_norm_layers(body).values():
        layer.reset_running_stats()
        layer.momentum = None  # the mean over all batches
    body.train()
    for inputs, _ in DataLoader(data, batch_size=250):
        body(inputs)
    body.eval()


def _percent(hits: Tensor) -> float:
    return 100 * hits.double().mean().item()


def _white_noise() -> Tensor:
    return torch.randn(128, 3, 32, 32, generator=torch.Generator().manual_seed(0))


def _hard(outcome: Outcome) -> Tensor:
    losses = _test_losses(outcome.beginning.network, outcome.split.test)
    return losses.topk(round(SHARE_OF_HARD * len(losses))).indices


@lru_cache(maxsize=4)
def _test_losses(network: nn.Module, test: Any) -> Tensor:
    """The losses of the network as it was before fine-tuning, (N,)."""
    return LossScorer(network, "cross_entropy", progress=False).score(test).losses


def _worst_class(outcome: Outcome) -> float:
    classes = outcome.split.test.tensors[1]
    return min(_percent(outcome.hits[classes == label]) for label in classes.unique())


def _loss_and_gradient_norm(network: nn.Module, data: Any, dtype: str) -> tuple[float, float]:
    """The mean loss of all samples, and the norm of its gradient on the first 256 of them."""
    losses = []
    for number, (inputs, labels) in enumerate(DataLoader(data, batch_size=256)):
        with torch.set_grad_enabled(number == 0), autocast(labels.device, dtype):
            logits = network(inputs)
        values = F.cross_entropy(logits.float(), labels, reduction="none")
        if number == 0:
            parameters = [p for p in network.parameters() if p.requires_grad]
            gradients = torch.autograd.grad(values.mean(), parameters)
            norm = sum(float(g.double().pow(2).sum()) for g in gradients) ** 0.5
        losses.append(values.detach())
    return torch.cat(losses).mean().item(), norm
