"""The methods of our own studies, beyond those that `flowdata.study` brings.

They answer questions about FLOW: Which temperature is best? Does FLOW work by its weights, or by
the smaller steps that they make? What do weights for tokens do?
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from types import SimpleNamespace

import torch
from torch import Tensor

from benchmarks.forgetting.texts import NOISY_EVERY
from flowdata.scores import Scores
from flowdata.streaming import FlowWeightedIterable
from flowdata.study import (
    METHODS,
    STANDARD,
    TEMPERATURES,
    Method,
    anchor,
    fixed_batch_norm,
    lora,
    weight_averaging,
)
from flowdata.study.methods import even, flow
from flowdata.token_weights import selective_token_weights
from flowdata.weights import flow_weights


def normalised(scores: Scores) -> Tensor:
    """Return FLOW's weights over their mean: the steps are as large as standard fine-tuning's."""
    weights = scores.weights()
    return weights / weights.mean()


def trimmed(share: float) -> Callable[[Scores], Tensor]:
    """Return a rule that leaves out the hardest share of the samples, by the frozen model's loss.

    The others' weight is such that an average step is as large as standard fine-tuning's.
    """

    def weights(scores: Scores) -> Tensor:
        kept = len(scores) - round(share * len(scores))
        easiest = scores.losses.argsort(stable=True)[:kept]
        return torch.zeros(len(scores)).index_fill_(0, easiest, len(scores) / kept)

    return weights


def clean_rows(scores: Scores) -> Tensor:
    """Return a bound for noisy texts: weight 0 for the rows that `texts.noisy` has shuffled.

    The others' weight is such that an average step is as large as standard fine-tuning's.
    """
    is_clean = torch.arange(len(scores)) % NOISY_EVERY != 0
    return is_clean * (len(scores) / is_clean.sum())


def small_losses(share: float) -> Callable[[Tensor, Tensor], Tensor]:
    """Return a rule that leaves out the share of each batch whose losses now are the largest.

    Source: small-loss selection, as in Co-teaching (arXiv:1804.06872), with one network.
    """

    def weights(losses: Tensor, takes_part: Tensor) -> Tensor:
        kept = len(losses) - round(share * len(losses))
        easiest = losses.argsort(stable=True)[:kept]
        return torch.zeros_like(losses).index_fill_(0, easiest, len(losses) / kept)

    return weights


def running_median(scores: Scores, window: int = 128) -> Tensor:
    """Return FLOW's weights as a stream gives them: a window's temperature is the median so far."""
    order = torch.randperm(len(scores), generator=torch.Generator().manual_seed(0)).tolist()
    # The stream's samples are the indices, and its scorer looks their losses up.
    scorer = SimpleNamespace(
        score=lambda window, **_: SimpleNamespace(losses=scores.losses[list(window)])
    )
    weights = torch.empty(len(scores))
    for index, weight in FlowWeightedIterable(order, scorer, window=window):
        weights[index] = weight
    return weights


def flow_tokens(scores: Scores) -> Tensor:
    """Return FLOW's token weights; their temperature is the median loss of all target tokens."""
    return flow_weights(_token_losses(scores))


def flow_both(scores: Scores) -> Tensor:
    """Return FLOW's token weights, each times the weight of its sequence."""
    return flow_tokens(scores) * scores.weights().repeat_interleave(scores.counts)


def easy_tokens(scores: Scores) -> Tensor:
    """Return weight 1 for tokens that are easy for the frozen model, and 0 for the others."""
    return selective_token_weights(_token_losses(scores))


def _token_losses(scores: Scores) -> Tensor:
    if scores.flat_token_losses is None:
        raise ValueError("token weights need scores with token losses; vision has none")
    return scores.flat_token_losses


TRIMMED = (0.05, 0.1, 0.165, 0.2, 0.25, 0.33, 0.4, 0.5, 0.66)  # shares of the samples
ABLATIONS: dict[str, Method] = {
    **TEMPERATURES,
    "FLOW, running median": Method(running_median),
    "FLOW normalised": Method(normalised),
    "standard, smaller steps": Method(even),
    "FLOW, gradient norm": Method(partial(flow, column="gradient_norm")),
    **{
        f"l2, {strength:g}": Method(parts=(anchor("l2", strength),))
        for strength in (1e-3, 3e-2, 1e-1)
    },
    **{f"WiSE-FT, {alpha:g}": Method(parts=(weight_averaging(alpha),)) for alpha in (0.25, 0.75)},
    **{f"LoRA, rank {rank}": Method(parts=(lora(rank),)) for rank in (2, 32)},
    **{f"trimmed, {share:.0%}": Method(trimmed(share)) for share in TRIMMED},
    **{f"small losses, {share:.0%}": Method(rule=small_losses(share)) for share in TRIMMED},
    "standard, BatchNorm fixed": Method(parts=(fixed_batch_norm,)),
    "FLOW, BatchNorm fixed": Method(flow, parts=(fixed_batch_norm,)),
}
TOKEN_METHODS: dict[str, Method] = {
    "TALR": Method(rule="talr"),
    "DFT": Method(rule="dft"),
    "EAFT": Method(rule="eaft"),
    "ASFT": Method(rule="dft", hold=0.1),
    "FLOW, tokens": Method(flow_tokens),
    "FLOW, both": Method(flow_both),
    "token masking": Method(easy_tokens),
}
# Averages of the pre-trained weights and those that another method ends with, by its name and α:
# where training is dear, they are made of models that are trained already.
AVERAGES: dict[str, tuple[str, float]] = {
    "WiSE-FT": (STANDARD, 0.5),
    "FLOW + WiSE-FT": ("FLOW", 0.5),
    **{f"WiSE-FT, {alpha:g}": (STANDARD, alpha) for alpha in (0.25, 0.75)},
}
ORDER = ("pre-trained", *METHODS, *TOKEN_METHODS, *ABLATIONS)  # of the tables' rows
