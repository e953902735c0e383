"""The choice of the penalty's strength: the whole grid, its edges, and few samples."""

import math

import pytest
import torch
from torch import nn

from flowdata.probe import strength as search
from flowdata.probe.fit import fit_head
from tests.test_fit import blobs


class Landscape:
    """A problem whose held-out loss is a given function of the strength."""

    def __init__(self, loss, samples=20):
        self.loss, self.samples, self.strengths = loss, samples, []

    def rows(self, indices):
        return self

    def start(self):
        return 0.0

    def solve(self, start, strength, tolerance):
        self.strengths.append(strength)
        return strength

    def mean_loss(self, solution):
        return self.loss(math.log10(solution))

    def best(self):
        strata = torch.arange(self.samples) % 2
        return search.best_strength(self, search.strengths_for(1000, 10), strata, 5)


def test_the_search_goes_on_where_the_loss_rises_at_first():
    hill = Landscape(lambda power: 1 + 0.1 * math.cos(3 * power) + 0.01 * (power + 4) ** 2)
    losses = {p: hill.loss(p) for p in range(2, -7, -1)}
    assert losses[1] > losses[2]
    best = min(losses, key=losses.get)
    assert abs(math.log10(hill.best()) - best) <= 0.5
    assert set(hill.strengths) == {float(f"1e{power}") for power in losses}


def test_between_the_strengths_the_loss_is_taken_for_a_parabola():
    assert math.log10(Landscape(lambda power: (power + 2.3) ** 2).best()) == pytest.approx(-2.3)


def messages(caplog):
    return [record.getMessage() for record in caplog.records]


def test_a_choice_at_the_edge_of_the_grid_is_said_with_the_remedy(caplog):
    assert Landscape(lambda power: -power).best() == 100
    assert Landscape(lambda power: power).best() == 1e-6
    strong, weak = messages(caplog)
    assert "strength=100, the strongest tried" in strong
    assert "give a larger strength" in strong
    assert "strength=1e-06, the weakest tried" in weak
    assert "give a smaller strength" in weak


def test_noise_and_exact_targets_choose_the_edges_and_a_usual_task_does_not(caplog):
    x, y = blobs()
    fit_head(nn.Linear(3, 3), x, y)
    assert messages(caplog) == []
    noise = torch.randn(40, 50, generator=torch.Generator().manual_seed(4))
    fit_head(nn.Linear(50, 2), noise, torch.arange(40) % 2)
    fit_head(nn.Linear(3, 1), x, x.sum(1))
    strong, weak = messages(caplog)
    assert "the strongest tried" in strong
    assert "the weakest tried" in weak


def test_many_features_and_few_samples_find_the_strong_penalty_that_they_need():
    generator = torch.Generator().manual_seed(2)
    y = torch.arange(40) % 2
    direction = 0.12 * torch.randn(400, generator=generator)

    def sample(classes):
        noise = torch.randn(len(classes), 400, generator=generator)
        return noise + (2 * classes[:, None] - 1) * direction

    x, new_y = sample(y), torch.arange(2000) % 2
    new_x = sample(new_y)

    def loss(**options):
        head = fit_head(nn.Linear(400, 2), x, y, **options)
        return nn.functional.cross_entropy(head(new_x), new_y).item()

    fixed = {strength: loss(strength=strength) for strength in (1.0, 10.0, 100.0)}
    assert min(fixed, key=fixed.get) > 1
    assert loss() < fixed[1.0]
    assert loss() < min(fixed.values()) + 0.02


@pytest.mark.parametrize("samples", [4, 6, 9])
def test_fewer_samples_than_folds_are_left_out_one_by_one(samples):
    x, y = blobs(samples=samples, classes=2)
    few = fit_head(nn.Linear(3, 2), x, y, folds=10)
    each = fit_head(nn.Linear(3, 2), x, y, folds=samples)
    assert torch.equal(few.weight, each.weight)
    assert few.weight.isfinite().all()


def test_two_values_of_a_regression_are_enough():
    head = fit_head(nn.Linear(1, 1), torch.tensor([[0.0], [1.0]]), torch.tensor([1.0, 3.0]))
    assert head.weight.isfinite().all()


def test_classes_of_one_sample_are_never_held_out_and_all_folds_hold_every_class():
    x, y = blobs(samples=60)
    y[0], y[1] = 3, 4  # alone in their classes
    held_out = search._folds(y, 5)
    assert len(held_out) == 15
    for fold in held_out:
        assert set(y[fold].tolist()) == {0, 1, 2}
        assert not {0, 1} & set(fold.tolist())
    assert all(len(torch.cat(held_out[i : i + 5]).unique()) == 58 for i in (0, 5, 10))
    alone = fit_head(nn.Linear(3, 5), x, y)
    assert alone.weight.isfinite().all()


@pytest.mark.parametrize("classes", [[0, 1, 2], [0, 1, 2, 0], [0, 1]])
def test_samples_that_say_nothing_of_each_other_give_a_fixed_strength_and_say_so(classes, caplog):
    y = torch.tensor(classes)
    x = torch.eye(3)[y] + 0.1 * torch.arange(3 * len(y)).reshape(-1, 3)
    chosen, fixed = (fit_head(nn.Linear(3, 3), x, y, **o) for o in ({}, {"strength": 1.0}))
    assert torch.equal(chosen.weight, fixed.weight)
    (message,) = messages(caplog)
    assert "the probe takes strength=1; give strength= to choose it" in message


def test_many_samples_are_dealt_to_the_folds_once():
    assert len(search._folds(torch.zeros(2000, dtype=torch.long), 5)) == 5
    assert search.strengths_for(2000, 10)[0] == 100
    assert search.strengths_for(20, 2000)[0] == 1e4
