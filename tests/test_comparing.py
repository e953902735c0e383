"""Scores of a tuned model beside those of the frozen one."""

import pytest
import torch

from flowdata import LossScorer, Scores
from flowdata.drift import compare
from flowdata.errors import ScoreMismatchError
from tests.models import tiny_llama, token_samples
from tests.test_drift import moved


def scores(*losses):
    return Scores(torch.tensor(losses), torch.ones(len(losses), dtype=torch.long))


def test_samples_come_in_the_order_of_what_became_of_their_losses():
    nan = float("nan")
    comparison = compare(scores(1.0, 2.0, nan, 0.5, 3.0), scores(0.5, 2.5, 1.0, 0.5, 1.0))
    assert comparison.learned() == [4, 0]
    assert comparison.learned(1) == [4]
    assert comparison.forgotten() == [1]
    summary = comparison.summary()
    assert (summary["compared"], summary["learned"], summary["forgotten"]) == (4, 2, 1)
    assert summary["mean_difference"] == pytest.approx(-0.5)


def test_scores_of_real_models_are_compared_where_samples_and_loss_agree():
    base, samples = tiny_llama(), token_samples(8)
    tuned = moved(base)
    before, after = (LossScorer(m, progress=False).score(samples) for m in (base, tuned))
    differences = compare(before, after).differences
    assert torch.equal(differences, after.losses - before.losses)
    others = LossScorer(tuned, progress=False).score(token_samples(8, seed=1))
    with pytest.raises(ScoreMismatchError, match="the scores differ in dataset"):
        compare(before, others)
    with pytest.raises(ScoreMismatchError, match="before has 8 samples and after 3"):
        compare(before, LossScorer(tuned, progress=False).score(samples[:3]))


def test_losses_in_the_place_of_scores_are_refused():
    with pytest.raises(TypeError, match="after must be Scores, got Tensor"):
        compare(scores(1.0), torch.ones(1))
