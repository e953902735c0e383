"""The check before a run: which way is trusted with a model, and whether ranks agree on it."""

from dataclasses import replace

import pytest
import torch
from torch import nn

from flowdata import LossScorer
from flowdata.scoring.check import TOLERANCE, agreed_way, disagreement
from flowdata.scoring.job import Job
from flowdata.scoring.plan.packs import PlanOptions
from flowdata.scoring.ranks import one_rank
from flowdata.targets.target_losses import TargetLosses
from tests.models import scale_logits, tiny_llama, token_samples


def way(values, counts, **further):
    """A way that gives these losses, whatever the model and the batch."""
    columns = {name: torch.tensor(each) for name, each in further.items()}
    losses = TargetLosses(torch.tensor(values), torch.tensor(counts), columns)
    return lambda model, batch: losses


def compare(fast, plain, dtype=torch.float32):
    return disagreement(fast, plain, nn.Identity(), None, dtype)


def test_ways_that_give_the_same_agree():
    plain = way([1.0, 2.0, 3.0], [1, 2, 0])
    assert compare(plain, plain) == ""  # a sample without a target is NaN in both


@pytest.mark.parametrize("dtype", TOLERANCE)
@pytest.mark.parametrize("loss", [0.1, 1.0, 50.0])
def test_the_allowance_is_absolute_below_one_nat_and_relative_above(dtype, loss):
    allowance = 3 * TOLERANCE[dtype] * max(loss, 1)  # of a sample with one target
    plain = way([loss], [1])
    assert compare(way([loss + 0.9 * allowance], [1]), plain, dtype) == ""
    assert "a sample's loss differs by" in compare(way([loss + 1.1 * allowance], [1]), plain, dtype)


def test_samples_of_many_targets_have_to_agree_more_closely():
    for count, agrees in ((1, True), (400, False)):
        off = way([1.0 + 2e-4] * count, [count])
        assert (compare(off, way([1.0] * count, [count])) == "") == agrees


def test_what_differs_is_said():
    plain = way([1.0, 2.0], [1, 1], entropy=[1.0, 1.0], correct=[1.0, 1.0])
    assert compare(way([1.0, 2.0], [2, 0]), plain) == "it counts [2, 0] targets, not [1, 1]"
    other = way([1.0, 2.0], [1, 1], entropy=[1.0, 1.5], correct=[1.0, 1.0])
    assert compare(other, plain) == "a sample's entropy differs by 0.5"
    tie = way([1.0, 2.0], [1, 1], entropy=[1.0, 1.0], correct=[0.0, 1.0])
    assert compare(tie, plain) == ""  # of two classes as likely either may come first

    def fails(model, batch):
        raise KeyError("no such layer\nand more")

    assert compare(fails, plain) == "KeyError: 'no such layer\\nand more'"


def job_of(model, samples, **options):
    scorer = LossScorer(model, "causal_lm", dtype="float32", progress=False, **options)
    return scorer._job(samples, None, None, 0)


def test_a_model_that_changes_its_logits_is_run_through_its_own_head(caplog):
    model = tiny_llama().eval()
    scale_logits(model, 7)
    job = job_of(model, token_samples(8))
    with torch.no_grad():
        _, description = agreed_way(job, PlanOptions(max_tokens=200), model, one_rank())
    assert description.startswith("target positions through the model's head, samples padded (")
    assert "not scoring by target positions through a tiled head" in caplog.text


def test_what_is_run_once_is_described():
    samples = [{"input_ids": torch.arange(3, 23), "labels": torch.arange(3, 23)}] * 8
    options = PlanOptions(max_tokens=200, prefix=12, shared_prompts=30)
    model = tiny_llama().eval()
    with torch.no_grad():
        _, description = agreed_way(job_of(model, samples), options, model, one_rank())
    assert description == (
        "target positions through a tiled head, samples packed, a prefix of 12 tokens run once "
        "(84 tokens saved), shared prompts run once (about 30 tokens saved)"
    )


def test_a_way_that_other_ranks_do_not_choose_is_refused():
    class Ranks:
        rank = 1

        def gather(self, name, value):
            return [value, "full logits"]

    model = tiny_llama().eval()
    job = job_of(model, token_samples(8))
    with torch.no_grad(), pytest.raises(ValueError, match=r"rank 1 can score by .*', another rank"):
        agreed_way(job, PlanOptions(max_tokens=200), model, Ranks())


def test_losses_without_ways_to_choose_from_have_no_description():
    job = job_of(tiny_llama(), token_samples(4))
    assert isinstance(job, Job)
    for loss in ("mse", lambda model, batch: batch):
        way, description = agreed_way(
            replace(job, loss=loss), PlanOptions(), nn.Identity(), one_rank()
        )
        assert callable(way)
        assert description == ""
