"""The methods of a study: the loop that they share, their parts and their weights."""

import math
import subprocess
import sys
from functools import partial

import pytest
import torch
from torch import nn

import flowdata
from benchmarks.forgetting import methods as ours
from flowdata.study import accuracy, classify, extras, hits, methods, parts, training
from tests import reference

X = torch.randn(32, 3, generator=torch.Generator().manual_seed(0))
Y = torch.randn(32, 2, generator=torch.Generator().manual_seed(1))


def network():
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Tanh(), nn.Linear(4, 2))


def fitted(*method_parts, model=None, steps=6, rate=0.1, momentum=0.9, seed=0, watch=None):
    """A network trained on all of X in each step, and where it started."""
    model = model or network()
    start = {name: value.clone() for name, value in model.state_dict().items()}

    def loss(batch):
        if watch:
            watch(model)
        return (model(X) - Y).square().mean()

    training.train(
        model,
        [None] * steps,
        steps,
        loss,
        lambda p: torch.optim.SGD(p, lr=rate, momentum=momentum),
        training.Method(parts=method_parts),
        seed=seed,
    )
    return start, dict(model.state_dict())


def moved(start, end):
    return {name for name in start if not torch.equal(start[name], end[name])}


def test_training_is_plain_sgd_under_a_cosine():
    model = network()
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9)
    for step in range(6):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / 6))
        optimizer.zero_grad()
        (model(X) - Y).square().mean().backward()
        optimizer.step()
    _, end = fitted()
    for name, value in model.state_dict().items():
        torch.testing.assert_close(end[name], value)


def test_the_rate_rises_in_a_line_and_falls_along_a_cosine():
    shares = [training.cosine(step, 100, 0.1) for step in range(101)]
    assert shares[:10] == pytest.approx([(i + 1) / 10 for i in range(10)])
    assert shares[55] == pytest.approx(0.5)
    assert shares[100] == pytest.approx(0)


def test_an_anchor_pulls_back_to_the_start():
    start, free = fitted(steps=20)
    _, held = fitted(parts.anchor("l2", 1.0), steps=20)
    far = [sum((end[n] - start[n]).square().sum() for n in ("0.weight", "3.weight"))
           for end in (free, held)]  # fmt: skip
    assert far[1] < 0.5 * far[0]


def test_wise_ft_averages_start_and_end():
    start, end = fitted()
    _, averaged = fitted(parts.weight_averaging(0.25))
    for name, wanted in reference.wise_ft(start, end, 0.25).items():
        if end[name].is_floating_point():
            torch.testing.assert_close(averaged[name].double(), wanted, atol=1e-6, rtol=1e-5)


def test_averaging_is_the_mean_of_all_weights_on_the_way():
    seen = []
    fitted(watch=lambda model: seen.append(model[0].weight.detach().clone()))
    _, end = fitted()
    _, averaged = fitted(parts.averaging)
    wanted = torch.stack([*seen, end["0.weight"]]).mean(0)
    torch.testing.assert_close(averaged["0.weight"], wanted)


def test_mofo_moves_the_entries_of_largest_momentum_alone():
    model = nn.Linear(3, 2, bias=False)
    with torch.no_grad():
        model.weight.copy_(torch.arange(6.0).reshape(2, 3) / 10)
    values, momentum = model.weight.flatten().tolist(), [0.0] * 6
    for step in range(4):
        weight = torch.tensor(values).reshape(2, 3)
        gradient = 2 * (X @ weight.T - Y).T @ X / Y.numel()
        rate = 0.1 * training.cosine(step, 4, 0.0)
        values, momentum = reference.mofo_step(
            values, gradient.flatten().tolist(), momentum, rate, 0.9, 0.34
        )
    _, end = fitted(parts.mofo(0.34), model=model, steps=4)
    torch.testing.assert_close(end["weight"].flatten(), torch.tensor(values))


def test_mofo_takes_adams_first_moment_as_momentum():
    model = nn.Linear(3, 2, bias=False)
    before = model.weight.detach().clone()
    training.train(
        model,
        [None],
        1,
        lambda _: (model(X) - Y).square().mean(),
        lambda p: torch.optim.AdamW(p, lr=0.1),
        training.Method(parts=(parts.mofo(0.5),)),
        seed=0,
    )
    assert int((model.weight != before).sum()) == 3


def test_hft_trains_another_half_of_the_layers_in_each_round():
    changed, last = [], {}

    def watch(model):
        now = {n: p.detach().clone() for n, p in model.named_parameters()}
        if last:
            changed.append({n.split(".")[0] for n in now if not torch.equal(now[n], last[n])})
        last.update(now)

    model = nn.Sequential(*(nn.Linear(3, 3) for _ in range(5)), nn.Linear(3, 2))
    fitted(parts.hft(4), model=model, steps=13, watch=watch, momentum=0.0)
    assert all(len(layers) == 3 for layers in changed)
    assert changed[0] == changed[1] == changed[2]  # one round
    assert len({frozenset(layers) for layers in changed}) > 1


def test_a_tied_parameter_is_one_block_of_hft():
    model = nn.Sequential(nn.Linear(3, 3), nn.Linear(3, 3), nn.Linear(3, 2))
    model[1].weight, model[1].bias = model[0].weight, model[0].bias
    start, end = fitted(parts.hft(1), model=model, steps=2)
    assert len({name[2:] for name in moved(start, end)}) == 2
    assert len(moved(start, end)) in (2, 4)  # the last layer, or the tied one under both names


class Convolutional(nn.Module):
    def __init__(self):
        super().__init__()
        torch.manual_seed(0)
        self.body = nn.Sequential(nn.Conv2d(1, 4, (1, 3)), nn.Flatten(), nn.BatchNorm1d(4))
        self.head = nn.Linear(4, 2)

    def forward(self, x):
        return self.head(self.body(x[:, None, None]))


def test_lora_moves_convolutions_and_linear_layers_by_low_rank_and_leaves_the_modules_whole():
    start, end = fitted(parts.lora(1), model=Convolutional(), steps=5)
    assert list(end) == list(start)
    assert {n for n in moved(start, end) if "running" not in n and "num" not in n} == {
        "body.0.weight",
        "head.weight",
    }
    difference = (end["body.0.weight"] - start["body.0.weight"]).flatten(1)
    assert torch.linalg.matrix_rank(difference, atol=1e-5) == 1


def test_lora_gives_gradients_back_to_all_parameters():
    model = Convolutional()
    fitted(parts.lora(1), model=model, steps=1)
    assert all(p.requires_grad for p in model.parameters())


def test_parts_add_up():
    start, alone = fitted(parts.lora(2), model=Convolutional())
    _, both = fitted(parts.weight_averaging(0.5), parts.lora(2), model=Convolutional())
    for name in ("body.0.weight", "head.weight"):
        torch.testing.assert_close(both[name], (start[name] + alone[name]) / 2)


SCORES = flowdata.Scores(
    torch.tensor([0.1, 0.5, 1.0, 4.0]),
    torch.tensor([1, 2, 1, 1]),
    token_losses=torch.tensor([0.1, 0.2, 0.8, 1.0, 4.0]),
    columns={"gradient_norm": torch.tensor([1.0, 2.0, 3.0, 4.0])},
)


def test_dro_prefers_hard_samples_as_strongly_as_flow_prefers_easy_ones():
    weights = methods.dro(SCORES)
    assert weights.mean() == pytest.approx(1)
    assert weights.tolist() == sorted(weights.tolist())
    assert flowdata.effective_sample_size(weights) == pytest.approx(
        flowdata.effective_sample_size(SCORES.weights()), rel=1e-4
    )
    slopes = weights.log().diff() / SCORES.losses.diff()  # exp(+loss / temperature): one slope
    torch.testing.assert_close(slopes, slopes[:1].expand(3))


def test_token_weights_lie_along_the_targets():
    tokens = torch.tensor(reference.flow_weights(SCORES.flat_token_losses.tolist(), 0.8))
    torch.testing.assert_close(ours.flow_tokens(SCORES), tokens.float())
    samples = SCORES.weights()
    torch.testing.assert_close(ours.flow_both(SCORES), (tokens * samples[[0, 1, 1, 2, 3]]).float())
    assert ours.easy_tokens(SCORES).tolist() == [1, 1, 1, 0, 0]  # perplexity up to 2.5
    with pytest.raises(ValueError, match="vision has none"):
        ours.flow_tokens(flowdata.Scores(SCORES.losses))


def test_running_median_weights_are_those_of_a_stream():
    losses = torch.rand(40, generator=torch.Generator().manual_seed(3)) + 0.1
    order = torch.randperm(40, generator=torch.Generator().manual_seed(0)).tolist()
    windows = [order[i : i + 16] for i in range(0, 40, 16)]
    wanted = reference.running_median_weights(windows, lambda i: losses[i].item())
    found = ours.running_median(flowdata.Scores(losses), window=16)
    torch.testing.assert_close(found[order], torch.tensor(wanted), rtol=3e-3, atol=0)


def by_hand(weights_of, steps):
    """A network trained on whole batches of X, each sample's loss times its weight."""
    model, labels = network(), Y.argmax(1)
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1, momentum=0.9, weight_decay=5e-4)
    for step in range(steps):
        optimizer.param_groups[0]["lr"] = 0.1 * 0.5 * (1 + math.cos(math.pi * step / steps))
        logits = model(X)
        losses = nn.functional.cross_entropy(logits, labels, reduction="none")
        optimizer.zero_grad()
        (losses * weights_of(logits.detach(), losses.detach())).mean().backward()
        optimizer.step()
    return model


@pytest.mark.parametrize(
    ("rule", "weights_of"),
    [
        ("dft", lambda logits, losses: (-losses).exp()),
        ("talr", lambda logits, losses: (-losses / losses.quantile(0.5)).exp()),
        (
            "eaft",
            lambda logits, losses: (
                torch.special.entr(logits.softmax(1)).sum(1) / math.log(logits.shape[1])
            ),
        ),
        (
            ours.small_losses(0.25),
            lambda logits, losses: (losses < losses.sort().values[24]).float() / 0.75,
        ),
    ],
)
def test_a_rule_weighs_a_classifiers_samples_by_their_losses_now(rule, weights_of):
    data = torch.utils.data.TensorDataset(X, Y.argmax(1))
    model, method = network(), training.Method(rule=rule)
    classify.fine_tune(model, data, torch.ones(32), method, rate=0.1, seed=0, epochs=4, batch=32)
    for ours_, theirs in zip(model.parameters(), by_hand(weights_of, 4).parameters(), strict=True):
        torch.testing.assert_close(ours_, theirs, rtol=1e-4, atol=1e-5)


def test_data_that_fills_no_batch_is_refused():
    data = torch.utils.data.TensorDataset(X[:20], Y[:20].argmax(1))
    for method in (training.Method(), training.Method(resample=True)):
        with pytest.raises(
            ValueError, match="the 20 training samples fill no batch of 32, so that"
        ):
            classify.fine_tune(
                network(), data, torch.ones(20), method, rate=0.1, seed=0, epochs=1, batch=32
            )


def identity(*columns):
    """A model whose logits are its inputs, but for given columns of another value."""
    model = nn.Linear(3, 3)
    with torch.no_grad():
        model.weight.copy_(torch.eye(3))
        model.bias.zero_()
        for column, value in columns:
            model.bias[column] = value
    return model


def test_the_accuracy_of_a_model_that_diverged_is_no_number():
    data = torch.utils.data.TensorDataset(torch.eye(3).repeat(3, 1), torch.zeros(9, dtype=int))
    assert accuracy(identity(), data) == pytest.approx(100 / 3)
    for value in (math.nan, math.inf):
        assert math.isnan(accuracy(identity((0, value)), data))
        assert not hits(identity((0, value)), data).any()
    assert accuracy(identity((2, -math.inf)), data) == pytest.approx(200 / 3)  # ruled out


@pytest.mark.parametrize("dtype", [torch.int64, torch.uint16, torch.uint8])
def test_classes_in_a_column_are_classes(dtype):
    inputs = torch.eye(3).repeat(4, 1)
    classes = torch.arange(12) % 3
    column = torch.utils.data.TensorDataset(inputs, classes.to(dtype)[:, None])
    assert hits(identity(), column).tolist() == [True] * 12
    models = []
    for data in (torch.utils.data.TensorDataset(inputs, classes), column):
        models.append(identity())
        classify.fine_tune(
            models[-1], data, torch.ones(12), training.Method(), rate=0.1, seed=0, epochs=1, batch=4
        )
    assert torch.equal(models[0].weight, models[1].weight)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        (torch.eye(3), r"for 3 samples got targets torch.float32 \(3, 3\); take .argmax"),
        (torch.eye(3).long(), r"got targets torch.int64 \(3, 3\)"),
        (torch.arange(3.0), r"got targets torch.float32 \(3,\)"),
        (torch.arange(3) + 1, "a sample of class 3, and the model 3 logits for classes 0 to 2"),
        (torch.arange(3) - 1, "a sample of class -1"),
    ],
)
def test_targets_that_are_no_classes_are_refused(targets, message):
    data = torch.utils.data.TensorDataset(torch.eye(3), targets)
    with pytest.raises(ValueError, match=message):
        accuracy(identity(), data)
    with pytest.raises(ValueError, match=message.replace("torch.float32", "torch.*")):
        classify.fine_tune(
            identity(), data, torch.ones(3), training.Method(), rate=0.1, seed=0, epochs=1, batch=3
        )


def test_a_single_logit_tells_no_classes():
    data = torch.utils.data.TensorDataset(torch.randn(4, 3), torch.tensor([0, 1, 0, 1]))
    with pytest.raises(ValueError, match="a sample of class 1, and the model 1 logits"):
        accuracy(nn.Linear(3, 1), data)
    with pytest.raises(ValueError, match=r"must return logits \(B, C\), got torch.float32 \(4,\)"):
        accuracy(nn.Sequential(nn.Linear(3, 1), nn.Flatten(0)), data)


def test_a_method_that_does_not_train_leaves_the_model_as_it_is():
    data = torch.utils.data.TensorDataset(X, Y.argmax(1))
    model, probe = network(), methods.METHODS[methods.LINEAR_PROBE]
    model.eval()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    how = {"seed": 0, "epochs": 1, "batch": 8}
    classify.fine_tune(model, data, torch.ones(32), probe, rate=0, **how)
    with pytest.raises(ValueError, match=r"trains=False .*: pass rate=0, got 0.1 \(`grids` gives"):
        classify.fine_tune(model, data, torch.ones(32), probe, rate=0.1, **how)
    training.train(
        model, [None], 1, lambda _: model(X).sum(), partial(torch.optim.SGD, lr=1), probe, seed=0
    )
    assert not moved(before, model.state_dict())  # BatchNorm's statistics among it
    assert not model.training


def test_trimming_leaves_out_the_hardest_and_keeps_the_size_of_steps():
    scores = flowdata.Scores(torch.tensor([0.1, 3.0, 0.2, 9.0, 0.3, 0.4]))
    assert ours.trimmed(1 / 3)(scores).tolist() == pytest.approx([1.5, 0, 1.5, 0, 1.5, 1.5])
    assert ours.trimmed(0.0)(scores).tolist() == [1] * 6


def test_batch_norm_in_evaluation_mode_keeps_its_statistics():
    watched = set()
    start, end = fitted(parts.fixed_batch_norm, watch=lambda model: watched.add(model[1].training))
    assert watched == {False}
    still = {name for name in start if "running" in name or "num_batches" in name}
    assert moved(start, end) == set(start) - still


def test_rates_are_for_methods_that_train():
    assert methods.grids(["linear probe", "FLOW"], [0.1]) == {
        "linear probe": (0.0,),
        "FLOW": (0.1,),
    }
    own = {"mine": training.Method(trains=False)}
    assert methods.grids(["mine"], [0.1], own) == {"mine": (0.0,)}
    with pytest.raises(ValueError, match="there is no method 'magic'; there are standard, linear"):
        methods.grids(["magic"], [0.1])


@pytest.mark.parametrize("package", ["scipy.stats", "matplotlib", "peft"])
def test_a_package_that_is_not_there_is_named_with_the_extra(monkeypatch, package):
    monkeypatch.setitem(sys.modules, package, None)
    name = package.partition(".")[0]
    with pytest.raises(
        ImportError, match=rf'rows need {name}: pip install "flowdata-torch\[study\]"'
    ):
        extras.load_extra(package, "rows")


def test_a_study_is_imported_without_its_extras():
    hidden = ["scipy", "matplotlib", "sklearn", "peft"]
    code = f"import sys; sys.modules.update(dict.fromkeys({hidden})); import flowdata.study"
    subprocess.run([sys.executable, "-c", code], check=True)
