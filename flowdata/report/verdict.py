"""A verdict in words: on what weights would act, and what to do, by the rule (`rule`).

Losses alone can't tell rows that are wrong from rows that are hard: the verdict says which to read.
The bounds are ours. Losses that lie as close as GSM8K's under an instruction-tuned model leave 95 %
of the samples in effect.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeAlias

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from flowdata.report.markdown import count
from flowdata.report.oddities import Oddities
from flowdata.report.page import percent
from flowdata.report.rule import AVERAGE, HARD, LARGE, RATE, RIGHT, SHARE, WRONG, Clause
from flowdata.report.summary import FEWEST, NATS
from flowdata.weights import RelativeTemperature, effective_sample_size, resolve_temperature, weigh

Mask: TypeAlias = "NDArray[np.bool_]"

_Picks: TypeAlias = dict[str, tuple[float, float]]  # temperature and origin by rule

RULES = ("median", "mean", "ess0.5", "ess0.9")  # the temperatures that a page offers
_ALIKE = 0.9  # effective share of the samples from which weights change little
_NEXT_TO_NOTHING = 1e-3  # mean weight below which training hardly moves
_FAR = 3.0  # temperatures above the origin: a weight below exp(−3) = 0.05
_FEW = 0.1  # effective share of the samples below which few of them decide
_KNOWN = 0.1  # nats: a probability of 0.9
_READ = 50  # of the hardest samples, to count the wrong
_HEAVY = 0.01  # share of the samples that lie so far from which on a tail is heavy
_WRONG_OR_RIGHT = (
    "That does not say that all rows are right: if some are wrong, weights hardly tell them from "
    "the others. If you doubt some rows, read the hardest; if few of these are wrong, losses are "
    "no help: check by other means, such as known answers or a second reader."
)
_CAUSES = {  # marks that may explain a large loss, as words for one sample and for several
    "outlier": ("an outlier", "outliers"),
    "copy": ("a copy", "copies"),
    "contradiction": ("a contradiction", "contradictions"),
}


@dataclass(frozen=True)
class Verdict:
    """A verdict.

    Attributes:
        title: in one sentence.
        text: the reasons and the advice, a paragraph each.
        clauses: those of the rule that the advice is taken from.
        code: a line of Python that does what the last paragraph says; "" where there is none.
    """

    title: str
    text: list[str]
    clauses: tuple[Clause, ...] = ()
    code: str = ""

    def plain_text(self) -> str:
        """Return the verdict for a terminal: title, paragraphs and code, one below the other."""
        return "\n".join(filter(None, [self.title, *self.text, f"  {self.code}".rstrip()]))


def judge(
    losses: Tensor,
    counts: Tensor,
    summary: Mapping[str, Any],
    oddities: Oddities,
    guessing: str = "",
    *,
    unit: str = NATS,
) -> Verdict:
    """Return the verdict on weighing a data set.

    Args:
        losses: (N,) floating; NaN where there is none.
        counts: (N,) int64, targets of each sample.
        summary: as `summarize` returns it.
        oddities: as `find_oddities` returns them.
        guessing: as `guessing_remark` returns it.
        unit: of the losses.
    """
    values = losses[~losses.isnan()]
    remark = [f"{guessing[0].upper()}{guessing[1:]}."] if guessing else []
    if len(values) < FEWEST:
        title = f"{count(len(values), 'row')} with a loss: too few to tell what weights would do."
        return Verdict(title, [*remark, f"Score {FEWEST} rows or more for a verdict."])
    if guessing:
        title = "The model does no better than guessing: check it before you weigh by its losses."
        return Verdict(title, remark)
    picks = temperatures(values)
    usual, name, share = _by_the_median(values, summary, picks)
    present = len(values)
    is_far = (losses - origin_of(usual) > _FAR * usual).numpy()  # NaN is not
    num_far = int(is_far.sum())
    effect = (
        f"At temperature {summary['temperature']:.3g} the weights amount to "
        f"{summary['effective_sample_size']:,.0f} of {present:,} samples "
        f"({percent(summary['effective_share'])}); their mean is {summary['weight']['mean']:.2g}."
    )
    if summary["temperature"] != usual:
        effect += (
            f" At the median of the losses, {usual:.3g}, they would amount to {percent(share)}."
        )
    if unit == NATS and values.max() <= _KNOWN:
        title = "The model knows all rows already: weights have nothing to sort out."
        return _by_rule(title, [f"{_least_known(float(values.max()))} {effect}"], name, RATE)
    if summary["weight"]["mean"] < _NEXT_TO_NOTHING:
        title = "The weights nearly vanish: training on them would hardly move the model."
        return Verdict(title, [effect, _larger(picks)])
    if num_far >= max(1, _HEAVY * present):
        title = "Some samples are far harder than the rest: read them before you weigh."
        about = _about(is_far, (~losses.isnan()).numpy(), counts, oddities)
        weights_lie = "its weight lies" if num_far == 1 else "their weights lie"
        text = [
            f"{effect} FLOW acts most on {count(num_far, 'sample')} ({num_far / present:.1%}): at "
            f"{name} {weights_lie} below a twentieth of the largest possible one.{about}"
        ]
        text += _at_few(share, picks)
        verdict = _by_rule(title, text, name, WRONG, SHARE, HARD, RATE)
        missing = len(losses) - present
        leave_out = "This line of Python leaves out the N hardest, about as many as are wrong"
        leave_out += f", and the {missing:,} without a loss" if missing else ""
        leave_out += " (of images, `rows = torch.utils.data.Subset(rows, keep)`):"
        text = [*verdict.text, _counting(present), leave_out]
        return replace(verdict, text=text, code=_leaving_out(missing))
    if share >= _ALIKE:
        title = "The weights would change little but the size of each step: "
        title += f"at {name} they count as {percent(share)} of the rows."
        return _by_rule(title, [effect, _WRONG_OR_RIGHT], name, RATE, AVERAGE)
    title = "The losses differ, without a heavy tail: weigh only if you know that rows are wrong."
    return _by_rule(title, [effect, _counting(present)], name, RIGHT, AVERAGE, WRONG, RATE, LARGE)


def _least_known(largest: float) -> str:
    """What a largest loss in nats, a mean over a sample's targets, says of their probabilities."""
    return (
        f"The largest loss is {largest:.2g} nats: of no sample have the targets less than "
        f"{math.floor(100 * math.exp(-largest))}%, in the geometric mean."
    )


def _counting(present: int) -> str:
    """How to tell which rows are wrong, of so many that have a loss."""
    unknown = "Losses can't tell a wrong row from a hard one: read"
    if present <= _READ:
        return f"{unknown} all {present} and count the wrong."
    return (
        f"{unknown} the {_READ} hardest, where wrong rows gather, and count the wrong. If nearly "
        f"all of these are, there are more: read on until half of the last {_READ} are right, and "
        f"leave out as many as you have read by then; right ones go with them. Among {_READ} rows "
        "drawn at random the share of wrong ones is that of all, give or take 14 points at most."
    )


def _leaving_out(missing: int) -> str:
    """The line of Python that leaves out the N hardest rows, and their scores.

    Rows without a loss, of which so many are missing, are the last that PyTorch sorts.
    """
    number = f"len(rows) - N - {missing}" if missing else "len(rows) - N"
    return (
        f"keep = scores.losses.argsort()[: {number}].sort().values.tolist(); "
        "rows, scores = [rows[i] for i in keep], scores[keep]"
    )


def _by_the_median(
    losses: Tensor, summary: Mapping[str, Any], picks: _Picks
) -> tuple[float, str, float]:
    """The temperature that losses are judged at, its name, and the effective share of the samples.

    It is the median, whatever temperature a user tries: the same losses have the same verdict.
    Only where the median is none does the user's take its place.
    """
    if "median" in picks:
        usual, name = picks["median"][0], "the median"
    else:
        usual = summary["temperature"]
        name = f"temperature {usual:.3g}"
    weights = weigh(losses, usual)
    size = effective_sample_size(weights) if weights.any() else 0.0
    return usual, name, size / len(losses)


def _by_rule(title: str, reasons: list[str], name: str, *clauses: Clause) -> Verdict:
    """The verdict with the advice of clauses, which take the weights at a named temperature."""
    advice = " ".join(clause.advice.replace("the median", name) for clause in clauses)
    return Verdict(title, [*reasons, advice], clauses)


def _larger(picks: _Picks) -> str:
    """What to do where the weights nearly vanish: losses that make them so have a mean."""
    if "ess0.5" in picks:
        return "Take ess0.5, whose largest weight is 1."
    return f"Take a larger temperature, such as the mean of the losses, {picks['mean'][0]:.3g}."


def _at_few(share: float, picks: _Picks) -> list[str]:
    """What to do where few samples carry nearly all of the weight."""
    if share >= _FEW:
        return []
    rule = "ess0.5, or " if "ess0.5" in picks else ""
    return [
        f"Few samples carry nearly all of the weight: if you weigh, take {rule}a temperature "
        "whose effective sample size suits you (the report has a slider for it)."
    ]


def _about(is_far: Mask, is_there: Mask, counts: Tensor, oddities: Oddities) -> str:
    """What the samples are that weights act on: their lengths, and the marks they bear."""
    text = ""
    lengths, is_near = counts.numpy(), is_there & ~is_far
    if (lengths != 1).any() and is_near.any():
        far, near = np.median(lengths[is_far]), np.median(lengths[is_near])
        targets = count(round(far), "target")
        if is_far.sum() == 1:
            text += f" It has {targets}, the others {near:,.0f} in the median."
        else:
            text += f" They have {targets} in the median, the others {near:,.0f}."
    marks = {name: int((oddities.marks[name] & is_far).sum()) for name in _CAUSES}
    words = [f"{size:,} as {_CAUSES[name][size > 1]}" for name, size in marks.items() if size]
    if words:
        text += f" Among them the report marks {', '.join(words)}."
    return text


def temperatures(losses: Tensor) -> _Picks:
    """Return the temperature and the origin that each rule picks, without rules that pick none.

    Args:
        losses: (N,) floating, all finite.

    Example:
        >>> import torch
        >>> temperatures(torch.tensor([1.0, 2.0, 3.0]))["median"]
        (2.0, 0.0)
    """
    picks: _Picks = {}
    for rule in RULES:
        try:
            temperature = resolve_temperature(losses, rule)
        except ValueError:  # ties for the smallest loss, or a median of 0
            continue
        picks[rule] = (float(temperature), origin_of(temperature))
    return picks


def origin_of(temperature: float) -> float:
    """Return the loss whose weight is 1."""
    if isinstance(temperature, RelativeTemperature):
        return temperature.smallest_loss
    return 0.0
