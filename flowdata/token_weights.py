"""Weights of single tokens: from the losses of the model that is trained, or from stored ones.

A *rule* makes weights anew in every batch, from the current model's losses (``"talr"``, ``"dft"``,
``"dro"``) or from how sure it is of its predictions (``"eaft"``). The other functions lay weights
from stored token losses along the labels of a data set, once.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, Literal, TypeAlias

import torch
from torch import Tensor

from flowdata.scores import Scores
from flowdata.scores.of_targets import weigh_targets
from flowdata.targets.labels import IGNORE_INDEX
from flowdata.weights import Missing, Temperature, positive_number

TokenRule: TypeAlias = "Literal['talr', 'dft', 'dro', 'eaft'] | Callable[[Tensor, Tensor], Tensor]"
LARGEST_LOGITS = 20  # of a token, which ``"eaft"`` looks at


def looks_at_logits(rule: TokenRule | None) -> bool:
    """Return whether a rule makes weights from the tokens' largest logits, and not their losses."""
    return rule == "eaft"


def rule_weights(rule: TokenRule, values: Tensor, takes_part: Tensor) -> Tensor:
    """Return the weights that a rule gives to the tokens of a batch, detached.

    Args:
        rule: ``"talr"``, ``"dft"``, ``"dro"`` or ``"eaft"`` (the functions below with their
            defaults), or a callable (losses, takes_part) -> weights.
        values: (n,) floating, the tokens' losses under the model that is trained; where
            `looks_at_logits`, (n, k) floating, the `LARGEST_LOGITS` of each.
        takes_part: (n,) bool, False for positions without a target or of weight 0.

    Returns:
        (n,) floating; 0 for positions that take no part.

    Raises:
        ValueError: an unknown rule, or a callable's weights have another shape.
    """
    if isinstance(rule, str) and rule not in _RULES:
        raise ValueError(
            f"token_rule must be one of {', '.join(map(repr, _RULES))} or a callable "
            f"(losses, takes_part) -> weights, got {rule!r}"
        )
    if not takes_part.numel():  # nothing has no median, and no largest value
        return values.new_zeros(takes_part.shape)
    weights = (_RULES[rule] if isinstance(rule, str) else rule)(values.detach(), takes_part)
    if weights.shape != takes_part.shape:
        raise ValueError(
            f"token_rule must return weights of shape {tuple(takes_part.shape)}, one for each "
            f"token, got {tuple(weights.shape)}"
        )
    # A rule may have made anything of a loss that takes no part, NaN included.
    return torch.where(takes_part, weights.detach(), 0.0)


def talr_weights(losses: Tensor, takes_part: Tensor, *, temperature: float | None = None) -> Tensor:
    """Return exp(−loss / temperature), by default with the median of the batch's token losses.

    Source: token-adaptive loss reweighting, arXiv:2509.20758.

    Example:
        >>> import torch
        >>> talr_weights(torch.tensor([1.0, 2.0, 9.0]), torch.tensor([True, True, False]))
        tensor([0.5134, 0.2636, 0.0025])
    """
    return torch.exp(-losses / _temperature(losses, takes_part, temperature))


def dft_weights(losses: Tensor, takes_part: Tensor) -> Tensor:
    """Return the token's own probability, exp(−loss): dynamic fine-tuning, arXiv:2508.05629.

    A model far from the data gives all tokens a weight near 0, and then learns next to nothing.

    Example:
        >>> import torch
        >>> dft_weights(torch.tensor([0.0, 1.0]), torch.tensor([True, True]))
        tensor([1.0000, 0.3679])
    """
    return torch.exp(-losses)


def dro_weights(losses: Tensor, takes_part: Tensor, *, temperature: float | None = None) -> Tensor:
    """Return exp(+loss / temperature) / its largest value: hard tokens count most.

    The sign is the opposite of FLOW's and makes a model forget more; the rule is here for contrast.
    The division keeps a single hard token from overflowing; under ``normalize="weights"`` it
    changes nothing.

    Example:
        >>> import torch
        >>> dro_weights(torch.tensor([1.0, 3.0]), torch.tensor([True, True]))
        tensor([0.3679, 1.0000])
    """
    hardest = torch.where(takes_part, losses, 0.0).amax()
    return torch.exp((losses - hardest) / _temperature(losses, takes_part, temperature))


def eaft_weights(logits: Tensor, takes_part: Tensor) -> Tensor:
    """Return the entropy of the likeliest tokens over its largest value, log k: 0 sure, 1 unsure.

    A token that the model is sure of and wrong about, the one that would do most damage, counts
    little; one that it is unsure of counts in full.

    Source: entropy-adaptive fine-tuning, arXiv:2601.02151, with k = 20. As in the authors' code the
    probabilities are those of the k likeliest tokens alone, which sum to 1. LLaMA-Factory divides
    by 3 (`use_eaft_loss`), which is log 20 but for 0.14 %, and takes no smaller vocabulary.

    Args:
        logits: (n, k) floating, each token's largest logits under the model that is trained.
        takes_part: (n,) bool; the weights of the others mean nothing.

    Example:
        >>> import torch
        >>> eaft_weights(torch.tensor([[0.0, 0.0], [9.0, 0.0]]), torch.tensor([True, True]))
        tensor([1.0000, 0.0018])
    """
    probabilities = logits.to(torch.promote_types(logits.dtype, torch.float32)).softmax(1)
    # A vocabulary of one class has no entropy, and no loss either.
    entropies: Tensor = torch.special.entr(probabilities).sum(1)
    return entropies / math.log(max(2, logits.shape[1]))


def selective_token_weights(reference_losses: Tensor, *, max_perplexity: float = 2.5) -> Tensor:
    """Return 1 for tokens that the reference model finds easy and 0 for the rest.

    Source: selective token masking, arXiv:2501.14315: tokens whose perplexity exp(loss) under the
    reference model exceeds a threshold are dropped.

    Args:
        reference_losses: floating, any shape: token losses of the frozen model, nats.
        max_perplexity: the threshold, > 1 (2.5 in the paper).

    Returns:
        The shape of `reference_losses`, float32.

    Raises:
        ValueError: the threshold is not above 1, the perplexity of a certain token.

    Example:
        >>> import torch
        >>> selective_token_weights(torch.tensor([0.1, 0.9, 1.0]))
        tensor([1., 1., 0.])
    """
    if not max_perplexity > 1:
        raise ValueError(f"max_perplexity must be > 1, got {max_perplexity!r}")
    return (reference_losses <= math.log(max_perplexity)).to(torch.float32)


def align_token_weights(
    weights: Tensor,
    labels: Tensor,
    *,
    truncated: Literal["no", "right", "left"] = "no",
    ignore_index: int = IGNORE_INDEX,
) -> Tensor:
    """Return one sample's token weights laid along its labels, 0 where there is no target.

    Scores keep one value for each target, in order; a loss wants one for each label.

    Args:
        weights: (n,) floating, one for each target of the sample as it was scored.
        labels: (T,) int64, unshifted, as they are trained on; the first is never a target.
        truncated: ``"no"`` requires as many targets as weights; ``"right"`` says that labels may
            have lost their end since the sample was scored, ``"left"`` their start.
        ignore_index: the label that marks positions without a target.

    Returns:
        (T,) in the dtype of `weights`.

    Raises:
        TypeError: not a tensor.
        ValueError: the number of targets doesn't fit.

    Example:
        >>> import torch
        >>> labels = torch.tensor([-100, -100, 7, 8])
        >>> align_token_weights(torch.tensor([0.5, 0.2, 0.9]), labels, truncated="right")
        tensor([0.0000, 0.0000, 0.5000, 0.2000])
    """
    if truncated not in ("no", "right", "left"):
        raise ValueError(f"truncated must be 'no', 'right' or 'left', got {truncated!r}")
    for name, value in (("weights", weights), ("labels", labels)):
        if not isinstance(value, Tensor):
            raise TypeError(f"{name} must be a tensor, got {type(value).__name__}")
    is_target = labels != ignore_index
    is_target[:1] = False
    count = int(is_target.sum())
    if count > len(weights) or (truncated == "no" and count != len(weights)):
        raise ValueError(
            f"labels have {count} targets, but the sample was scored with {len(weights)}: these "
            "are other labels (another template, mask or truncation); score what you train on, "
            "or pass truncated='right' or 'left' if labels were only cut since"
        )
    aligned = weights.new_zeros(len(labels))
    first = len(weights) - count if truncated == "left" else 0
    aligned[is_target] = weights[first : first + count]
    return aligned


def token_weight_column(
    scores: Scores,
    labels: Iterable[Any],
    *,
    mode: Literal["token", "both"] = "token",
    temperature: Temperature = "median",
    truncated: Literal["no", "right", "left"] = "no",
    missing: Missing = "raise",
) -> list[list[float]]:
    """Return a data set's column of token weights exp(−loss / temperature), laid along the labels.

    A data set with this column (``dataset.add_column("weight", ...)``) trains under
    `FlowTrainer`, `FlowSFTTrainer` or `WeightedCollator`, packed or padded.

    Source: the modes ``"token"`` and ``"both"`` of the authors' code of arXiv:2502.02797, where
    the temperature is taken over all target tokens.

    Args:
        scores: made with ``token_losses=True``, N samples.
        labels: N label sequences, (T,) int64 each, unshifted, in the data set's order.
        mode: ``"token"``, or ``"both"``: each token's weight times the weight of its sample,
            whose temperature the same rule picks from the samples' losses.
        temperature: as in `resolve_temperature`; ``"ess…"`` weighs relative to the smallest loss,
            as in `flow_weights`, whose warnings are given here as well.
        truncated: as in `align_token_weights`.
        missing: ``"raise"`` refuses samples with targets but without a finite loss, ``"zero"``
            gives all their tokens weight 0.

    Returns:
        N lists of T floats each; 0 where a label is no target.

    Raises:
        ValueError: scores without token losses, another number of samples, samples without a
            finite loss under ``missing="raise"``, or labels whose targets are not those that were
            scored (the sample named).

    Example:
        >>> import torch
        >>> from flowdata import Scores
        >>> losses = torch.tensor([1.0, 1.0, 1.0])
        >>> scores = Scores(torch.ones(2), torch.tensor([1, 2]), token_losses=losses)
        >>> column = token_weight_column(scores, [[5, 6], [5, 6, 7]])
        >>> [[round(weight, 3) for weight in row] for row in column]
        [[0.0, 0.368], [0.0, 0.368, 0.368]]
    """
    sequences = [torch.as_tensor(row) for row in labels]
    if len(sequences) != len(scores):
        raise ValueError(
            f"{len(sequences)} label sequences for the scores of {len(scores)} samples"
        )
    column = []
    of_targets = weigh_targets(scores, mode=mode, temperature=temperature, missing=missing)
    for index, (weights, sequence) in enumerate(zip(of_targets, sequences, strict=True)):
        try:
            aligned = align_token_weights(weights, sequence, truncated=truncated)
        except ValueError as error:
            raise ValueError(f"sample {index}: {error}") from None
        column.append(aligned.tolist())
    return column


def _temperature(losses: Tensor, takes_part: Tensor, temperature: float | None) -> Tensor | float:
    """Return the temperature of a rule: the one that was passed, or the median of the losses."""
    smallest = torch.finfo(losses.dtype).tiny  # a subnormal one could turn out as 0 in a division
    if temperature is not None:
        return max(positive_number(temperature), smallest)
    # A median of 0 means that half of the tokens are certain: they keep weight 1, the rest get 0.
    return _median(losses, takes_part).clamp_min(smallest)


def _median(losses: Tensor, takes_part: Tensor) -> Tensor:
    """Return the mean of the two middle values of the losses that take part."""
    # To pick these losses would make the host wait for their number. Instead the others become
    # infinite and sort to the end, and the middle is looked up by a count that stays on the device.
    ordered = torch.where(takes_part, losses, torch.inf).sort().values
    count = takes_part.sum()
    middle = torch.stack([(count - 1).clamp_min(0) // 2, count // 2])
    return ordered.gather(0, middle.clamp_max(len(ordered) - 1)).mean()


_RULES: dict[str, Callable[[Tensor, Tensor], Tensor]] = {
    "talr": talr_weights,
    "dft": dft_weights,
    "dro": dro_weights,
    "eaft": eaft_weights,
}
