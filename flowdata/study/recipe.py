"""The paper's recipe for a task with a head of its own, step by step.

    begin           fit a new head on the frozen body; score the samples, whose losses make weights
    (the caller)    fine-tune head and body by any loop
    fit_new_head    fit the head once more, on the fine-tuned body
    as_old_network  put the old head and the old BatchNorm back, to measure the old task

Source: Sanyal et al., ICML 2025, arXiv:2502.02797, section 5.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, NamedTuple

from torch import nn

from flowdata.companions.batch_norm import batch_norm_state
from flowdata.probe.linear_probe import linear_probe
from flowdata.scores import Scores
from flowdata.scoring.scorer import LossScorer


class Beginning(NamedTuple):
    """The start of fine-tuning: the network with its probed head, and the samples' scores."""

    network: nn.Sequential
    scores: Scores


def begin(
    body: nn.Module,
    head: nn.Linear,
    data: Any,
    *,
    strength: float,
    dtype: str = "auto",
    columns: Sequence[str] = (),
    workers: int = 0,
) -> Beginning:
    """Probe a head for the new task on the frozen body, and score the new task's samples.

    Args:
        body: the pre-trained network's, (B, …) → (B, D); nothing in it changes.
        head: D → C, for the new task; its values are replaced in place.
        data: map-style, samples (input, class), without augmentation.
        strength: strength of the probe's ℓ2 penalty, see `fit_head`.
        dtype: dtype of the body's pass for the probe; ``"auto"`` is the body's own. Scoring takes
            the network's own dtype, because a class's loss has one target only and its rounding
            error is not averaged out.
        columns: further columns of the scores, see `LossScorer`.
        workers: number of processes that load samples.

    Returns:
        Body and head as one network, not copied, and the scores of `data` under it.
    """
    network = nn.Sequential(body, head)
    fit_new_head(network, data, strength=strength, dtype=dtype, workers=workers)
    scorer = LossScorer(network, "cross_entropy", columns=columns, progress=False)
    return Beginning(network, scorer.score(data, num_workers=workers))


def fit_new_head(
    network: nn.Sequential, data: Any, *, strength: float, dtype: str = "auto", workers: int = 0
) -> None:
    """Fit a network's head on its present body, for the recipe's first round and its second.

    Args:
        network: body and head; the head's values are replaced in place.
        data: as for `begin`.
        strength: as for `begin`.
        dtype: as for `begin`.
        workers: as for `begin`.

    Raises:
        TypeError: the head is no `nn.Linear`.
    """
    body, head = network
    if not isinstance(head, nn.Linear):
        raise TypeError(f"a network must end in an nn.Linear, got {type(head).__name__}")
    linear_probe(
        body, head, data, strength=strength, dtype=dtype, num_workers=workers, progress=False
    )


def as_old_network(network: nn.Sequential, old: nn.Sequential) -> nn.Sequential:
    """Return a fine-tuned body with the head and the BatchNorm of the old network.

    The body is that of `network`, not a copy: its BatchNorm is changed in place.
    """
    network[0].load_state_dict(batch_norm_state(old[0]), strict=False)
    return nn.Sequential(network[0], old[1])
