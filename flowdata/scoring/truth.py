"""The truth: one sample, collated alone, through the model's own forward.

Nothing is cut out of a batch for it. What a way makes of samples in a pack is judged by it:

    exact    the truth in float32
    plain    the truth in the dtype of the run; |plain − exact| is what that dtype costs
    way      may differ from `exact` by twice that, and a thousandth of a nat

Rounding averages out over a sample's targets, and a text's first tokens are off by more than later
ones. So what a dtype costs is carried from long samples to short ones by a power of how many
targets they have.

Where the library lowers the dtype it may cost no more than rounding does. Positions up to a
thousand, say, have no place in bfloat16, and each way would make the same wrong losses of them.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor, nn

from flowdata.models.as_loaded import as_loaded
from flowdata.models.compiled import as_written
from flowdata.models.layout import as_laid_out
from flowdata.models.placement import is_placed
from flowdata.models.precision import dtype_of, has_memory_for_copy, name_of
from flowdata.models.tensors import cloned
from flowdata.scoring.job import FEW, Job
from flowdata.scoring.lend import lent_model
from flowdata.scoring.plan.packs import PlanOptions
from flowdata.store.packs import Columns
from flowdata.targets.target_losses import Fetched, Way

# Differences of two low-precision runs that are not looked into, in nats, and as a share of larger
# losses. Rounding makes them anyway: plain forwards in bfloat16 were off by 2e-3 to 2e-2 nats.
_UNREMARKABLE = {torch.bfloat16: 3e-3, torch.float16: 5e-4}
LEEWAY = 1e-3  # nats that any way may differ by; of other losses, a thousandth of their size
# For where no float32 copy of the model fits into memory, and at most for what is carried to short
# samples: differences of two low-precision runs that are rounding, in nats below a loss of 1 nat
# and as a share of the loss above.
_ROUNDING = {torch.bfloat16: 2e-2, torch.float16: 4e-3}
_OF_TARGETS = 100  # how many a sample had of which that is known
_MORE_THAN_ROUNDING = 2.5  # times as much, in a long sample, is no rounding
# The power of the number of targets by which rounding falls: 0.5 if it were the same at each token.
_AVERAGING = 0.7
# A run looks at many samples, and the largest rounding of many is larger than that of the few that
# it is known from: one sample of GSM8K, off by 2.1e-2 nats in bfloat16, stopped a run of SmolLM2.
_RAREST = 2.0


@dataclass
class Truth:
    """The truth of a job's samples, and how far from it a way may be.

    Attributes:
        job: the job.
        options: those of its plan.
        model: the job's model as it is run.
        plain_of: makes the way of a sample alone for a model: that of the run, or its copy.
        in_nats: whether losses are cross-entropies; else `LEEWAY` is relative.
        batches: of the samples checked before the run, each collated alone.
        errors: by column, the largest errors of the plain way in the run's dtype so far.
        error_of_one: the largest error of a loss, carried to a single target.
        is_last_look: whether nothing more can be learned of the errors.
        samples: how many samples were compared.
        largest: by column, the largest difference between an agreed way and the truth.
        classes: how many classes, or tokens, the samples' logits told apart.
        noun: what the losses are, in messages.
    """

    job: Job
    options: PlanOptions
    model: nn.Module
    plain_of: Callable[[nn.Module], Way]
    in_nats: bool
    batches: list[Any] = field(default_factory=list)
    errors: dict[str, float] = field(default_factory=dict)
    error_of_one: float = 0.0
    is_last_look: bool = False
    samples: int = 0
    largest: float = 0.0
    classes: set[int] = field(default_factory=set)
    noun: str = "loss"

    @property
    def num_classes(self) -> int:
        """The number of classes, or tokens, if all samples have the same; 0 where none is known."""
        return max(self.classes) if len(self.classes) == 1 else 0

    @property
    def is_lowered(self) -> bool:
        """Whether the model's own dtype is another one than the run's, which is a low one."""
        return not self.is_exact and self.job.dtype != dtype_of(self.job.model)

    @property
    def is_exact(self) -> bool:
        """Whether the run's own dtype is float32 or wider, so that nothing is rounded away."""
        return self.job.dtype.itemsize >= 4

    def columns(self, batch: Any, model: nn.Module | None = None) -> Columns:
        """Return the loss, count and further columns of a sample collated alone, (1,) each.

        Args:
            batch: the sample's.
            model: the model in float32; None for that of the run.
        """
        model = self.model if model is None else model
        batch = cloned(batch)  # a forward may change its inputs
        with as_written(model), as_laid_out(), as_loaded(model):
            losses = self.plain_of(model)(model, batch)
        self.classes.add(losses.num_classes)
        columns = losses.columns(token_losses=False)
        check_size(columns, 1)
        return columns

    @contextmanager
    def exact_model(self) -> Iterator[nn.Module | None]:
        """Give the model in float32 for a block; None where no such copy can be had."""
        if self.is_exact:
            yield self.model
            return
        job = replace(self.job, dtype=torch.float32)
        if is_placed(job.model) or not has_memory_for_copy(job.model, job.dtype, job.device):
            yield None
            return
        with lent_model(job, replace(self.options, compile=False)) as model:
            yield model

    def check_dtype(self, batch: Any, error: RuntimeError) -> None:
        """Raise ValueError where it is the run's dtype, or its own, that a model fails in.

        Args:
            batch: a sample collated alone.
            error: that the model raised.
        """
        reason = str(error).partition("\n")[0]
        with suppress(RuntimeError), self.exact_model() as model:
            if not self.is_exact and model is not None and self.columns(batch, model):
                dtype = name_of(self.job.dtype)
                raise ValueError(
                    f"the model does not run in {dtype} ({reason}), and it does in float32; pass "
                    "dtype='float32'"
                ) from error
        dtypes = {name_of(p.dtype) for p in self.model.parameters() if p.is_floating_point()}
        if len(dtypes) > 1 and "type" in reason:
            raise ValueError(
                f"the model has parts in {' and '.join(sorted(dtypes))}, which do not run together "
                f"({reason}); convert the model to one of them, as by model.float(), or between "
                "its parts in its forward"
            ) from error

    def check_rounding(self, plain: Sequence[Columns], exact: Sequence[Columns]) -> None:
        """Raise ValueError where the run's dtype costs samples more than rounding.

        Args:
            plain: their columns in the run's dtype.
            exact: the same in float32.
        """
        values = torch.cat([each["loss"] for each in plain])
        expected = torch.cat([each["loss"] for each in exact])
        counts = torch.cat([each["count"] for each in exact]).clamp_min(1)
        share = _ROUNDING[self.job.dtype] * (_OF_TARGETS / counts) ** _AVERAGING
        share = share.clamp_min(_MORE_THAN_ROUNDING * _ROUNDING[self.job.dtype])
        usual = float(expected.abs().nanmedian())  # beside which a small loss may be off by more
        least = min(max(usual, 0.1), 1.0) if self.in_nats else usual
        errors, most = values - expected, share * expected.abs().clamp_min(least)
        is_number = expected.isfinite()
        is_off = is_number & ~(errors.abs() <= most)
        # Rounding errors have either sign, so that those of several samples cancel.
        mean, mean_most = errors[is_number].mean(), most[is_number].mean()
        if bool(is_off.any()) or bool(mean.abs() > mean_most / is_number.sum().sqrt()):
            place = int(
                (errors.abs() / most).masked_fill(~is_number, 0.0).nan_to_num(torch.inf).argmax()
            )
            dtype = name_of(self.job.dtype)
            raise ValueError(
                f"in {dtype} a sample's {self.noun} is {float(values[place]):.4g}, in float32 "
                f"{float(expected[place]):.4g}, which is more than rounding: something of the "
                "model, such as positions or frequencies, needs more digits. Pass dtype='float32'; "
                f"or load the model in {dtype}, if that is how it is meant to run"
            )

    def learn_errors(self, plain: Sequence[Columns], exact: Sequence[Columns]) -> None:
        """Take the plain way's errors on samples into account."""
        for rounded, true in zip(plain, exact, strict=True):
            for name in set(true) - {"count"}:
                error = float((rounded[name] - true[name]).abs().nan_to_num().max())
                self.errors[name] = max(error, self.errors.get(name, 0.0))
            error = float((rounded["loss"] - true["loss"]).abs().nan_to_num().max())
            self.error_of_one = max(error * int(true["count"]) ** _AVERAGING, self.error_of_one)

    def start(self, batch: Any) -> Fetched:
        """Return the losses of a sample collated alone on their way to the host."""
        with as_written(self.model), as_laid_out(), as_loaded(self.model):
            return Fetched(self.plain_of(self.model)(self.model, cloned(batch)))

    def difference(self, columns: Columns, true: Columns, batch: Any) -> str:
        """Return "" if a sample of the run is right, else how it differs from the truth.

        What looks wrong is looked at again, in float32 beside the samples of the check before the
        run: one sample's rounding can be larger than theirs.

        Args:
            columns: what the run made of the sample.
            true: what it has alone, in the run's dtype.
            batch: the sample, collated alone.
        """
        reason = difference(self, columns, true)
        if not reason or self.is_exact:
            return reason
        with self.exact_model() as model:
            if model is None:
                self.is_last_look = True
                return difference(self, columns, true)
            batches = [*self.batches, batch]
            exact = [self.columns(each, model) for each in batches]
        self.learn_errors([self.columns(each) for each in batches], exact)
        return difference(self, columns, exact[-1], times=_RAREST)

    def difference_to_same_way(self, columns: Columns, alone: Columns) -> str:
        """Return "" if a sample of the run is as the same way makes it alone, else what differs.

        Both may be rounded, and nothing in float32 tells by how much: what is usual is allowed.

        Args:
            columns: what the run made of the sample, beside others.
            alone: what the same way makes of it alone.
        """
        usual = replace(self, errors={}, is_last_look=True)
        return difference(usual, columns, alone, times=_RAREST)

    def allowance(self, name: str, true: Tensor, count: int) -> Tensor:
        """Return how far a column's values may lie from the true ones, (1,).

        Args:
            name: the column's.
            true: (1,) its true value.
            count: the sample's number of targets.
        """
        size = true.abs()
        scale = torch.ones_like(size) if self.in_nats else size.clamp_max(1.0)
        rounding = 1e-5 * size  # of sums in float32
        if not self.is_exact and name not in self.errors and not self.is_last_look:
            return _UNREMARKABLE[self.job.dtype] * (size.clamp_min(1.0) if self.in_nats else size)
        if not self.is_exact and (name != "loss" or name not in self.errors):
            # Further columns are no losses: they are compared for faults, not for each rounding.
            rounding = _ROUNDING[self.job.dtype] * size.clamp_min(1.0)
        # Of a few samples the largest error is itself uncertain, so it is taken less often.
        times = 1.5 if len(self.job.dataset) <= FEW else 2.0
        error = torch.full_like(size, self.errors.get(name, 0.0))
        if name == "loss" and not self.is_exact:
            of_few = torch.full_like(size, self.error_of_one / max(count, 1) ** _AVERAGING)
            most = _ROUNDING[self.job.dtype] * size.clamp_min(1.0)
            error = error.maximum(of_few.minimum(most))
        return times * error + LEEWAY * scale + rounding


def check_size(columns: Columns, samples: int) -> None:
    """Raise ValueError unless there is one loss for each sample of a batch."""
    if len(columns["loss"]) != samples:
        raise ValueError(
            f"a batch of {samples} samples gave {len(columns['loss'])} losses; collate_fn and loss "
            "must keep one entry for each sample, in order"
        )


def difference(truth: Truth, columns: Columns, true: Columns, times: float = 1.0) -> str:
    """Return "" if a sample's columns are right, else how they differ from the true ones.

    Args:
        truth: says how far they may differ.
        columns: (1,) loss, count and further columns, as a way made them.
        true: the true ones.
        times: how many times as far they may differ.
    """
    if int(columns["count"]) != int(true["count"]):
        return f"it counts {int(columns['count'])} targets, not {int(true['count'])}"
    for name in sorted(set(true) - {"count", "correct"}):  # a tie may be broken either way
        value, expected = columns[name], true[name]
        is_nan = bool(value.isnan()), bool(expected.isnan())
        off, allowed = (value - expected).abs(), truth.allowance(name, expected, int(true["count"]))
        if is_nan[0] != is_nan[1] or bool(off > times * allowed):
            noun = truth.noun if name == "loss" else name
            return (
                f"a sample's {noun} differs by {float(off):.2g} ({float(value):.6g}, alone "
                f"{float(expected):.6g})"
            )
    return ""
