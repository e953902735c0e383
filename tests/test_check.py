"""The check before a run: which way is right for a model, and whether ranks agree on it."""

from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import DriftMeter, LossScorer
from flowdata.scoring.check import agreed_way, samples_to_check
from flowdata.scoring.grouping import alike, alone, together
from flowdata.scoring.job import Job
from flowdata.scoring.kinds import differing, kind_of
from flowdata.scoring.plan.packs import PlanOptions, plan_fixed
from flowdata.scoring.planning import make_plan
from flowdata.scoring.ranks import one_rank
from flowdata.scoring.truth import LEEWAY, Truth, difference
from tests.models import TinyResNet, images, scale_logits, tiny_llama, token_samples


def truth_of(dtype=torch.float32, *, in_nats=True, **errors):
    job = replace(job_of(tiny_llama(), token_samples(20)), dtype=dtype)
    return Truth(job, PlanOptions(), job.model, lambda model: None, in_nats, errors=errors)


def columns(loss, count=1, **further):
    return {
        "loss": torch.tensor([loss]),
        "count": torch.tensor([count]),
        **{name: torch.tensor([value]) for name, value in further.items()},
    }


def job_of(model, samples, **options):
    scorer = LossScorer(model, "causal_lm", dtype="float32", progress=False, **options)
    return scorer._job(samples, None, None, 0)


def plan_of(samples, **options):
    plan = plan_fixed(len(samples), batch_size=64)
    return replace(plan, options=PlanOptions(max_tokens=200, **options))


def test_the_same_losses_agree():
    assert difference(truth_of(), columns(1.0), columns(1.0)) == ""
    nan = float("nan")
    assert difference(truth_of(), columns(nan, 0), columns(nan, 0)) == ""  # without a target


@pytest.mark.parametrize("loss", [0.01, 1.0, 50.0])
def test_in_float32_a_way_may_be_off_by_a_thousandth_of_a_nat(loss):
    truth = truth_of()
    allowed = LEEWAY + 1e-5 * loss
    assert difference(truth, columns(loss + 0.98 * allowed), columns(loss)) == ""
    assert "a sample's loss differs by" in difference(
        truth, columns(loss + 1.02 * allowed), columns(loss)
    )


def test_other_units_are_judged_by_their_size():
    truth = truth_of(in_nats=False)
    assert difference(truth, columns(1.0009e-4), columns(1e-4)) == ""
    assert difference(truth, columns(1.1e-4), columns(1e-4)) != ""


def test_in_low_precision_a_way_may_be_off_by_twice_what_the_plain_one_is():
    truth = truth_of(torch.bfloat16, loss=0.03)
    assert difference(truth, columns(1.06), columns(1.0)) == ""
    assert difference(truth, columns(1.062), columns(1.0)) != ""


def test_what_rounding_costs_long_samples_is_more_on_short_ones():
    truth = truth_of(torch.bfloat16)
    truth.learn_errors([columns(3.004, 256)], [columns(3.0, 256)])
    error = truth.errors["loss"]
    for count, times in ((256, 1.0), (64, 2.64), (16, 6.96), (8, 11.3)):
        allowed = 2 * times * error + LEEWAY + 3e-5
        assert difference(truth, columns(3 + 0.98 * allowed, count), columns(3.0, count)) == ""
        assert difference(truth, columns(3 + 1.02 * allowed, count), columns(3.0, count)) != ""
    # No more than what is taken for rounding anyway: 2 % of the loss.
    assert difference(truth, columns(3.13, 1), columns(3.0, 1)) != ""
    assert difference(truth, columns(3.12, 1), columns(3.0, 1)) == ""
    exact = truth_of()
    exact.learn_errors([columns(3.004, 256)], [columns(3.0, 256)])
    assert difference(exact, columns(3.02, 1), columns(3.0, 1)) != ""  # nothing is rounded there


def test_what_differs_is_said():
    truth = truth_of()
    assert difference(truth, columns(1.0, 2), columns(1.0, 1)) == "it counts 2 targets, not 1"
    assert difference(truth, columns(2.0), columns(1.5)) == (
        "a sample's loss differs by 0.5 (2, alone 1.5)"
    )
    nan = float("nan")
    assert difference(truth, columns(nan), columns(1.5)).startswith("a sample's loss differs by")
    other = columns(1.0, entropy=1.5, correct=1.0)
    assert difference(truth, other, columns(1.0, entropy=1.0, correct=1.0)) == (
        "a sample's entropy differs by 0.5 (1.5, alone 1)"
    )
    # Of two classes as likely either may come first.
    assert difference(truth, columns(1.0, correct=0.0), columns(1.0, correct=1.0)) == ""


def test_samples_that_differ_are_looked_at():
    rows = [{"input_ids": [1] * n, "labels": [1] * n} for n in (9, 3, 40, 12, 20, 11)]
    rows[4]["labels"] = [-100] * 19 + [1]  # of many tokens the fewest targets
    rows[5]["images"] = [object()]
    places = differing(rows, 8)
    assert {1, 2, 4, 5} <= set(places)
    assert len(differing([rows[0]] * 50, 8)) == 4  # of equals several, to share a batch
    assert kind_of({"pixels": torch.ones(2, 3, 8, 8)}) != kind_of(
        {"pixels": torch.ones(1, 3, 8, 8)}
    )


def test_masks_and_positions_tell_kinds_of_samples_apart():
    tokens = {"input_ids": [4] * 6, "labels": [4] * 6}
    alike = [tokens | {"attention_mask": [1] * 6}, tokens | {"attention_mask": torch.ones(6)}]
    masks = (
        [0, 0, 1, 1, 1, 1],
        [1, 1, 0, 1, 1, 1],
        [1, 1, 1, 1, 0, 0],
        [0] * 6,
        [0, 1, 0, 1, 0, 0],
    )
    others = [tokens | {"attention_mask": mask} for mask in masks]
    others += [each | {"labels": [-100] * 3 + [4] + [-100] * 2} for each in others[:3]]
    others.append(others[2] | {"labels": [4] * 5 + [-100]})  # the first padding is a target
    others += [
        tokens | {"position_ids": [0, 1, 2, 0, 1, 2]},
        tokens | {"position_ids": [*range(6)]},
    ]
    kinds = [kind_of(sample) for sample in others]
    as_tensors = [{k: torch.tensor(v) for k, v in sample.items()} for sample in others]
    assert len({kind_of(alike[0]), *kinds}) == len(others) + 1
    for sample, tensors in zip(others, as_tensors, strict=True):
        assert kind_of(sample)[-2:] == kind_of(tensors)[-2:]
    assert kind_of(alike[0])[-2:] == kind_of(alike[1])[-2:] == ((), False)
    assert 20 in differing([alike[0]] * 20 + [others[2]] + [alike[0]] * 20, 8)


def test_the_shortest_and_the_longest_of_all_are_checked():
    samples = token_samples(400)
    samples[123] = {name: values[:3] for name, values in samples[123].items()}
    scorer = LossScorer(tiny_llama(), "causal_lm", dtype="float32", progress=False)
    job = scorer._job(samples, None, None, 0)

    checked = [len(sample["input_ids"]) for sample in samples_to_check(job, make_plan(job, 1, {}))]
    assert min(checked) == 3
    assert max(checked) == max(len(sample["input_ids"]) for sample in samples)


@pytest.mark.parametrize("size", [16, 40])
@pytest.mark.parametrize("measure", [LossScorer.score, DriftMeter])
def test_a_model_that_refuses_batches_is_given_samples_alone_however_many_there_are(size, measure):
    # Without a token to pad with. Those that are checked differ in length: each a batch of its own.
    config = transformers.GPT2Config(vocab_size=50, n_embd=16, n_layer=1, n_head=2, num_labels=3)
    model = transformers.GPT2ForSequenceClassification(config).eval()
    samples = [
        {"input_ids": torch.arange(4 + place % 8) + place % 8, "labels": place % 3}
        for place in range(size)
    ]
    if measure is DriftMeter:
        assert DriftMeter(model, samples)(model).kl == 0
        return
    scorer = LossScorer(model, "cross_entropy", dtype="float32", progress=False)
    scores = scorer.score(samples)
    with torch.no_grad():
        logits = [model(sample["input_ids"][None]).logits for sample in samples]
    labels = torch.tensor([sample["labels"] for sample in samples])
    expected = F.cross_entropy(torch.cat(logits), labels, reduction="none")
    torch.testing.assert_close(scores.losses, expected, rtol=1e-5, atol=1e-5)
    scorer._suspects = (1,)  # is looked at beside all of its pack
    torch.testing.assert_close(scorer.score(samples).losses, expected, rtol=1e-5, atol=1e-5)


NOTED = []


class Noting(nn.Linear):
    """Notes the single samples that it is run on, and in which dtype."""

    def forward(self, x):
        if len(x) == 1:
            NOTED.append((self.weight.dtype, x[0, 0].item()))
        return super().forward(x)


def test_of_a_small_data_set_each_sample_is_looked_at_alone_once_in_each_dtype():
    NOTED.clear()
    inputs = torch.arange(16.0)[:, None].expand(16, 4)  # all are numbers in bfloat16, too
    scorer = LossScorer(Noting(4, 3), "cross_entropy", dtype="bfloat16", progress=False)
    scorer.score(TensorDataset(inputs, torch.arange(16) % 3))
    exact, plain = (
        [place for at, place in NOTED if at == dtype] for dtype in (torch.float32, torch.bfloat16)
    )
    assert sorted(exact) == list(range(16))
    assert set(plain) == set(range(16))
    assert len(plain) < 2 * 16  # one or another is looked at for what the model makes, too


def test_suspects_of_another_data_set_are_none_of_this():
    samples = token_samples(30)
    scorer = LossScorer(tiny_llama(), "causal_lm", dtype="float32", progress=False)
    scorer._suspects = (100, 7)  # as a sample that was found wrong leaves them
    assert scorer._job(samples, None, None, 0).suspects == (7,)
    assert len(scorer.score(samples)) == 30


def test_groups_keep_the_samples_order():
    rows = [(torch.ones(2), 1), (torch.zeros(2), 0), (torch.ones(3), 1)]
    assert together(rows) == [rows]
    assert alike(rows) == [rows[:2], rows[2:]]
    assert alone(rows) == [[row] for row in rows]
    assert alike([{"text": "ab"}, {"text": "cd"}, {"text": "e"}])[0] == [
        {"text": "ab"},
        {"text": "cd"},
    ]


def test_a_model_that_changes_its_logits_is_run_through_its_own_head(caplog):
    model, samples = tiny_llama().eval(), token_samples(8)
    scale_logits(model, 7)
    job = job_of(model, samples)
    with torch.no_grad():
        agreed = agreed_way(job, plan_of(samples), model, one_rank())
    assert agreed.description.startswith(
        "target positions through the model's head, samples padded ("
    )
    assert agreed.grouping is together
    assert "not by target positions through a tiled head" in caplog.text


def test_what_is_run_once_is_described():
    samples = [{"input_ids": torch.arange(3, 23), "labels": torch.arange(3, 23)}] * 8
    model, plan = tiny_llama().eval(), plan_of(samples, prefix=12, shared_prompts=30)
    with torch.no_grad():
        agreed = agreed_way(job_of(model, samples), plan, model, one_rank())
    assert agreed.description == (
        "target positions through a tiled head, samples packed, a prefix of 12 tokens run once "
        "(84 tokens saved), shared prompts run once (about 30 tokens saved)"
    )


def test_a_way_that_other_ranks_do_not_choose_is_refused():
    class Ranks:
        rank = 1

        def gather(self, name, value):
            return [value, "full logits"]

    model, samples = tiny_llama().eval(), token_samples(8)
    job = job_of(model, samples)
    with torch.no_grad(), pytest.raises(ValueError, match=r"rank 1 can score by .*', another rank"):
        agreed_way(job, plan_of(samples), model, Ranks())


def test_losses_without_ways_to_choose_from_have_no_description():
    data, model = images(8), TinyResNet().eval()
    scorer = LossScorer(model, "cross_entropy", dtype="float32", progress=False)
    job = scorer._job(data, None, None, 0)
    assert isinstance(job, Job)

    def sums(model, batch):
        return model(batch[0]).sum(1)

    for loss in ("cross_entropy", sums):
        with torch.no_grad():
            agreed = agreed_way(replace(job, loss=loss), plan_of(data), model, one_rank())
        assert agreed.description == ""
        assert agreed.truth.samples == 8  # all of so small a data set
        assert agreed.truth.largest < 1e-5


def test_a_model_of_chance_is_refused():
    class Chance(nn.Module):
        def forward(self, x):
            return torch.randn(len(x), 3)

    data = torch.utils.data.TensorDataset(torch.randn(6, 2), torch.arange(6) % 3)
    with pytest.raises(ValueError, match=r"another loss each time it is run alone .*deterministic"):
        LossScorer(Chance(), "cross_entropy", progress=False).score(data)


def test_a_loss_that_compares_the_samples_of_a_batch_is_refused():
    def contrastive(model, batch):
        features = nn.functional.normalize(model(batch[0]), dim=1)
        return nn.functional.cross_entropy(
            features @ features.t() / 0.1, torch.arange(len(features)), reduction="none"
        )

    torch.manual_seed(0)
    data = TensorDataset(torch.randn(20, 4), torch.zeros(20))
    with pytest.raises(ValueError, match=r"a loss of 0 when it is alone.*contrastive losses do"):
        LossScorer(nn.Linear(4, 8), contrastive, progress=False).score(data)


class Contrasting(nn.Module):
    """Each sample's own positive against the positives of the others in its batch."""

    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.layer = nn.Linear(4, 4)

    def forward(self, anchor, positive):
        sides = (nn.functional.normalize(self.layer(each)) for each in (anchor, positive))
        products = 100 * next(sides) @ next(sides).T
        return {"loss": nn.functional.cross_entropy(products, torch.arange(len(products)))}


@pytest.mark.parametrize("loss", ["auto", "own"])
def test_an_own_loss_that_compares_the_samples_of_a_batch_is_refused(loss):
    samples = [{"anchor": torch.randn(4), "positive": torch.randn(4)} for _ in range(20)]
    model = Contrasting()
    for sample in samples:  # a trained model tells samples apart, and has hardly a loss of two
        sample["positive"] = sample["anchor"]
    with pytest.raises(ValueError, match=r"'own' gives .* 0 when .* for two of them.*contrastive"):
        LossScorer(model, loss, progress=False).score(samples)


def test_an_own_loss_of_0_that_compares_nothing_is_taken():
    class Fitted(nn.Linear):
        def forward(self, x, labels):
            return {"loss": (super().forward(x) - labels).square().mean()}

    model, x = Fitted(4, 1), torch.randn(9, 4)
    labels = nn.functional.linear(x, model.weight, model.bias).detach()
    rows = [{"x": each, "labels": label} for each, label in zip(x, labels, strict=True)]
    assert LossScorer(model, "own", progress=False).score(rows).losses.abs().max() < 1e-9
