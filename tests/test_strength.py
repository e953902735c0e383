"""The choice of the penalty's strength: the whole grid, its edges, and few samples."""

import math

import pytest
import torch
from torch import nn

from flowdata.probe import strength as search
from flowdata.probe.fit import fit_head
from flowdata.probe.problem import LOSSES
from tests.test_fit import blobs


class Landscape:
    """A problem whose held-out loss is a given function of the strength."""

    def __init__(self, landscape, samples=20, loss="mse"):
        self.landscape, self.samples, self.loss = landscape, samples, LOSSES[loss]
        self.strengths = []

    def rows(self, indices):
        return self

    def start(self):
        return 0.0

    def solve(self, start, strength, tolerance):
        self.strengths.append(strength)
        return strength

    def mean_loss(self, solution):
        return self.landscape(math.log10(solution))

    def best(self):
        strata = torch.arange(self.samples) % 2
        return search.best_strength(self, search.strengths_for(1000, 10), strata, 5)


def test_the_search_goes_on_where_the_loss_rises_at_first():
    losses = dict(zip(range(2, -7, -1), [5, 6, 7, 6, 4, 2, 1, 2, 3], strict=True))
    hill = Landscape(lambda power: losses[round(power)])
    assert hill.best() == pytest.approx(1e-4)
    assert set(hill.strengths) == {float(f"1e{power}") for power in losses}


def test_between_the_strengths_the_loss_is_taken_for_a_parabola():
    assert math.log10(Landscape(lambda power: (power + 2.3) ** 2).best()) == pytest.approx(-2.3)


def test_less_than_a_nat_in_all_is_no_reason_for_a_surer_head():
    def falling(power):
        return 1 - 0.01 * (power < 0) - 0.001 * (round(power) == -2)

    assert Landscape(falling, 200, "cross_entropy").best() == 0.1
    assert Landscape(falling, 5000, "cross_entropy").best() == 0.01
    assert Landscape(falling, 200, "mse").best() == 0.01


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
    noise = torch.randn(200, 5, generator=torch.Generator().manual_seed(4))
    fit_head(nn.Linear(5, 2), noise, torch.arange(200) % 2)
    fit_head(nn.Linear(3, 1), x, x.sum(1))
    strong, weak = messages(caplog)
    assert "the strongest tried" in strong
    assert "the weakest tried" in weak


def test_many_features_and_few_samples_find_the_strong_penalty_that_they_need():
    """Every feature tells the target faintly; a weaker penalty follows the noise."""
    generator = torch.Generator().manual_seed(2)
    weight = torch.randn(400, generator=generator) / 20
    x, new_x = (torch.randn(n, 400, generator=generator) for n in (40, 2000))
    y, new_y = (z @ weight + 5 * torch.randn(len(z), generator=generator) for z in (x, new_x))

    def loss(**options):
        head = fit_head(nn.Linear(400, 1), x, y, **options)
        return nn.functional.mse_loss(head(new_x)[:, 0], new_y).item()

    fixed = {strength: loss(strength=strength) for strength in (0.1, 1.0, 10.0, 100.0, 1000.0)}
    assert min(fixed, key=fixed.get) > 1
    assert loss() < fixed[1.0]


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
