"""One architecture's row: the truth, what the library scored, and the verdicts."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn

from benchmarks.sweep.architectures import KINDS, Kind
from benchmarks.sweep.building import NotBuildable, build, candidates, first_line
from benchmarks.sweep.image_text import image_text_samples
from benchmarks.sweep.samples import SIMPLE, Data
from benchmarks.sweep.sounds import sound_samples
from benchmarks.sweep.truth import plain_losses, true_losses
from benchmarks.sweep.verdicts import REFUSED, UNJUDGED, WRONG, how, judge
from flowdata import LossScorer

_LARGEST_LOSS = 1e4  # nats; a truth above it says nothing about a score


@dataclass(frozen=True)
class Case:
    """A model that runs, its samples, and their true losses in float32."""

    kind: Kind
    model: nn.Module
    data: Data
    truths: list[float]


def make_row(kind_name: str, name: str) -> dict[str, Any]:
    """Return the row of an architecture: what to judge it by, and a verdict a dtype."""
    kind = KINDS[kind_name]
    row: dict[str, Any] = {"kind": kind_name, "name": name}
    try:
        case = make_case(kind, name)
    except NotBuildable as reason:
        return row | {"built": False, "why": str(reason)}
    row |= {
        "built": True,
        "class": type(case.model).__name__,
        "samples": case.data.note,
    }
    return row | {"float32": score(case, torch.float32), "bfloat16": score(case, torch.bfloat16)}


def make_case(kind: Kind, name: str) -> Case:
    """Return the first configuration of an architecture that runs, as a case.

    Raises:
        NotBuildable: none runs; the message is the first failure's.
    """
    failures = []
    for config in candidates(kind, name):
        try:
            return case_of(kind, config)
        except Exception as error:  # whatever it is, the next configuration may run
            failures.append(str(error) if isinstance(error, NotBuildable) else first_line(error))
    raise NotBuildable(failures[0])


def case_of(kind: Kind, config: Any) -> Case:
    """Build a configuration's model and samples, and take the truth twice.

    Raises:
        NotBuildable: the model's losses are no numbers, or random.
    """
    model = build(kind, config)
    if kind.name in SIMPLE:
        data = SIMPLE[kind.name](config)
    else:
        data = (
            image_text_samples(model, kind)
            if kind.loss == "causal_lm"
            else sound_samples(model, kind)
        )
    truths = true_losses(model, data.samples, data.collate, kind)
    if not all(math.isfinite(loss) and loss < _LARGEST_LOSS for loss in truths):
        raise NotBuildable(f"its loss of a sample alone is {max(truths, key=abs)}")
    if true_losses(model, data.samples, data.collate, kind) != truths:
        raise NotBuildable("its loss of a sample alone is another every time")
    return Case(kind, model, data, truths)


def score(case: Case, dtype: torch.dtype) -> dict[str, Any]:
    """Score a case in a dtype under `auto`, else by the kind's loss, and judge what comes."""
    plain_error, why_not = None, ""
    if dtype is not torch.float32:
        try:
            plain_error = _plain_error(case, dtype)
        except Exception as error:  # the model itself may not run in this dtype
            why_not = first_line(error)
    refusals: dict[str, str] = {}
    for loss in filter(None, ("auto", case.kind.loss, "own")):
        with flowdata_notices() as notices:
            try:
                name = str(dtype).removeprefix("torch.")
                scorer = LossScorer(case.model, loss, dtype=name, progress=False)
                scores = scorer.score(case.data.samples, collate_fn=case.data.collate)
            except Exception as error:  # a refusal, of which the row keeps the first line
                refusals[loss] = first_line(error)
                continue
        losses = scores.losses.tolist()
        verdict, error, wrong = judge(losses, case.truths, plain_error)
        part = {
            "verdict": UNJUDGED if why_not else verdict,
            "how": how(scorer.explain()),
            "loss": loss,
            "error": error,
            "plain_error": plain_error,
            "why_no_plain_error": why_not,
            "refusals": refusals,
            "explanation": scorer.explain(),
        }
        details = {"wrong": wrong, "losses": losses, "truths": case.truths, "notices": notices}
        return part | (details if part["verdict"] == WRONG else {})
    return {"verdict": REFUSED, "refusals": refusals, "plain_error": plain_error}


def _plain_error(case: Case, dtype: torch.dtype) -> float:
    losses = plain_losses(case.model, case.data.samples, case.data.collate, case.kind, dtype)
    return max(abs(low - true) for low, true in zip(losses, case.truths, strict=True))


@contextmanager
def flowdata_notices() -> Iterator[list[str]]:
    """What the library says in its log meanwhile."""
    notices: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: notices.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger("flowdata")
    logger.addHandler(handler)
    try:
        yield notices
    finally:
        logger.removeHandler(handler)
