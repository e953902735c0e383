"""Scores of a tuned model beside those of the frozen one."""

import re

import pytest
import torch

from flowdata import LossScorer, Scores
from flowdata.drift import compare
from flowdata.errors import ScoreMismatchError
from tests.models import tiny_llama, token_samples
from tests.test_drift import moved
from tests.test_report import Page


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


def test_scores_of_other_samples_are_refused_also_where_nothing_names_them():
    base, samples = tiny_llama(), token_samples(8)
    other_way_round = samples[::-1]

    def score(samples, **options):
        return LossScorer(base, progress=False).score(samples, **options)

    with pytest.raises(ScoreMismatchError, match="the scores differ in dataset"):
        compare(score(samples), score(other_way_round))
    before, after = (score(each, dataset_id="mine") for each in (samples, other_way_round))
    first = int((before.counts != after.counts).nonzero()[0])
    with pytest.raises(ScoreMismatchError, match=f"sample {first} has .* same samples in the same"):
        compare(before, after)
    bare = [Scores(each.losses, each.counts) for each in (before, after)]
    with pytest.raises(ScoreMismatchError, match="not of the same samples"):
        compare(*bare)


def test_a_sample_that_one_of_both_lacks_may_have_another_count():
    nan = float("nan")
    before = Scores(torch.tensor([1.0, nan]), torch.tensor([3, 0]))
    after = Scores(torch.tensor([0.5, 2.0]), torch.tensor([3, 4]))
    assert compare(before, after).learned() == [0]


def test_losses_in_the_place_of_scores_are_refused():
    with pytest.raises(TypeError, match="after must be Scores, got Tensor"):
        compare(scores(1.0), torch.ones(1))


def scored(base, tuned, samples):
    return [LossScorer(model, progress=False).score(samples) for model in (base, tuned)]


def test_the_page_shows_what_moved_most_in_both_directions_and_stands_alone(tmp_path):
    base, samples = tiny_llama(), token_samples(40)
    comparison = compare(*scored(base, moved(base), samples))
    path = comparison.write(tmp_path / "new", samples=lambda i: f"text of {i}.", top=3)
    assert path == tmp_path / "new" / "comparison.html"
    source = path.read_text("utf-8")
    page = Page(source)
    learned, forgotten = comparison.learned(3), comparison.forgotten(3)
    differences = comparison.differences
    assert learned == differences.argsort()[:3].tolist()
    assert forgotten == differences.argsort(descending=True)[:3].tolist()
    assert re.findall(r"text of (\d+)\.", page.text) == [str(i) for i in learned + forgotten]
    change = f"change −{abs(float(differences[learned[0]])):.3g}"
    assert f"#{learned[0]}{change}" in page.text
    assert f"change +{float(differences[forgotten[0]]):.3g}" in page.text
    assert "causal_lm" in page.text
    assert "40samples compared" in page.text
    assert page.tags.count("script") == 2  # the table's data and its code, both in the page
    outside = [value for value in page.attributes if re.match(r"(https?:)?//|[^d].*\.png", value)]
    assert outside == []
    assert source.count("data:image/png;base64,") == 4  # two pictures, light and dark
    assert source.count('class="accent"') == source.count('class="warn"') == 3


def test_every_text_of_the_page_is_escaped(tmp_path):
    nasty = "</pre><script>alert('&')</script> {body}\0"
    path = compare(scores(1.0, 2.0), scores(0.5, 2.5)).write(tmp_path, samples=lambda _: nasty)
    page = Page(path.read_text("utf-8"))
    assert page.tags.count("script") == 2  # none of them is the sample's
    assert page.text.count(nasty.replace("\0", "\\x00")) == 2


@pytest.mark.parametrize(
    ("before", "after"),
    [
        ([1.0], [0.5]),
        ([1.0, 2.0], [1.0, 2.0]),
        ([1.0, 2.0, 3.0], [2.0, 3.0, 4.0]),
        ([0.0, 1.0], [1e6, 0.0]),
        ([1.0, float("nan")], [2.0, 1.0]),
        ([-1.0, -2.0], [-3.0, 0.5]),
    ],
)
def test_odd_changes_are_drawn_without_a_warning(tmp_path, before, after, recwarn):
    page = Page(compare(scores(*before), scores(*after)).write(tmp_path).read_text("utf-8"))
    assert not recwarn.list
    present = [(a, b) for a, b in zip(before, after, strict=True) if a == a and b == b]
    assert page.text.count("None.") == 2 - any(b < a for a, b in present) - any(
        b > a for a, b in present
    )


def test_nothing_to_compare_is_refused(tmp_path):
    nan = float("nan")
    with pytest.raises(ValueError, match="none of the 2 samples has a loss both before and after"):
        compare(scores(1.0, nan), scores(nan, 1.0)).write(tmp_path)
    with pytest.raises(ValueError, match="top must be >= 0, got -1"):
        compare(scores(1.0), scores(0.5)).write(tmp_path, top=-1)
    assert list(tmp_path.iterdir()) == []
