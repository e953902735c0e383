"""What may change between two measurements of drift, and what state models are measured in."""

import copy
import random
import warnings

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import FlowWeightedDataset, linear_probe
from flowdata.drift import DriftMeter, OutputAnchor, smooth_images
from flowdata.models.evaluation import in_evaluation
from tests.models import TinyResNet, tiny_llama, token_samples
from tests.test_drift import moved
from tests.test_drift_heads import ROWS, Net, kl_of

IMAGES = smooth_images((3, 8, 8), 16)


def test_a_probe_that_was_changed_is_told():
    texts, base = token_samples(12), tiny_llama()
    meter = DriftMeter(base, texts)
    random.Random(1).shuffle(texts)
    with pytest.raises(ValueError, match="sample 0 is another one than when the meter was made"):
        meter(base)
    rows = ROWS.clone()
    meter = DriftMeter(Net(), rows)
    rows.mul_(2)
    with pytest.raises(ValueError, match="is another one than when the meter was made"):
        meter(Net())


def test_a_collation_that_draws_is_refused():
    def collate(rows):
        return torch.stack(rows) * (torch.rand(len(rows), 1) < 0.5)

    with pytest.raises(ValueError, match="collate_fn makes another batch of the probe's sample"):
        DriftMeter(Net(), ROWS, collate)


class Masked(Net):
    """Takes a second input where it is given one."""

    def forward(self, x, mask=None):
        return super().forward(x if mask is None else x * mask.view(-1, 1))


@pytest.mark.parametrize("kind", [Net, Masked])
def test_weights_of_a_weighted_data_set_are_no_inputs(kind):
    dataset = TensorDataset(ROWS, torch.zeros(len(ROWS), dtype=torch.long))
    base, weighted = kind(), FlowWeightedDataset(dataset, torch.rand(len(ROWS)))
    tuned = moved(base)
    assert DriftMeter(base, weighted)(tuned).kl == DriftMeter(base, dataset)(tuned).kl
    with pytest.raises(TypeError, match="no use for weights, got a FlowWeightedDataset"):
        linear_probe(base.body, nn.Linear(8, 2), weighted)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("behind", [None, lambda logits: logits.square() - 1])
def test_a_default_dtype_leaves_drift_as_it_is(dtype, behind):
    base = Net(behind=behind)
    tuned = moved(base, 0.003)
    expected = DriftMeter(base, ROWS)(tuned).kl
    torch.set_default_dtype(dtype)
    try:
        meter = DriftMeter(base, ROWS)
        assert meter(tuned).kl == pytest.approx(expected, rel=1e-6)
        assert OutputAnchor(meter, 0.1)(tuned).dtype == torch.float32
    finally:
        torch.set_default_dtype(torch.float32)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
def test_a_probe_in_another_dtype_is_held_as_it_is_measured(dtype):
    base = TinyResNet().to(dtype).eval()
    meter = DriftMeter(base, IMAGES)
    anchor = OutputAnchor(meter, 1e-3, batch_size=len(IMAGES))
    assert anchor(base) < 1e-6
    tuned = moved(base, 0.5)
    penalty = anchor(tuned)
    assert 1e3 * penalty.item() == pytest.approx(meter(tuned).kl, rel=0.1)


class Switched(Net):
    """Its `train` sets an attribute of its own."""

    is_noisy = True

    def train(self, mode=True):
        super().train(mode)
        self.is_noisy = mode
        return self

    def forward(self, x):
        return super().forward(x + x.roll(1, 1) if self.is_noisy else x)


def test_a_models_own_train_is_called():
    base = Switched().train()
    tuned = moved(base).train()
    drift = DriftMeter(base, ROWS)(tuned)
    assert base.is_noisy
    assert tuned.is_noisy
    expected = kl_of(copy.deepcopy(base).eval(), copy.deepcopy(tuned).eval(), ROWS)
    assert drift.kl == pytest.approx(float(expected), rel=1e-4)
    with in_evaluation(base):
        assert not base.is_noisy


class OwnBatchNorm(nn.Module):
    """BatchNorm of somebody's own."""

    def __init__(self, size):
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.ones(size)), nn.Parameter(torch.zeros(size))
        self.register_buffer("running_mean", torch.zeros(size))
        self.register_buffer("running_var", torch.ones(size))

    def forward(self, x):
        statistics = self.running_mean, self.running_var
        return F.batch_norm(x, *statistics, self.weight, self.bias, self.training, 0.1)


class Normalised(nn.Module):
    """Two BatchNorm layers, registered in either order."""

    def __init__(self, names=("first", "second"), kind=nn.BatchNorm2d):
        super().__init__()
        torch.manual_seed(0)
        self.one, self.two, self.head = nn.Conv2d(3, 6, 3), nn.Conv2d(6, 6, 3), nn.Linear(6, 3)
        for name in names:
            setattr(self, name, kind(6))

    def forward(self, x):
        x = self.second(self.two(self.first(self.one(x)).relu())).relu()
        return self.head(x.mean((2, 3)))


def trained(model, images):
    model.train()
    with torch.no_grad():
        for _ in range(5):
            model(images)
    return model.eval()


def test_batch_norm_of_somebodys_own_is_put_back_as_well():
    base = trained(Normalised(kind=OwnBatchNorm), IMAGES)
    tuned = trained(copy.deepcopy(base), 5 * IMAGES - 2)
    meter = DriftMeter(base, IMAGES)
    assert meter(tuned).kl == 0
    expected = kl_of(base, tuned, IMAGES)
    assert meter(tuned, batch_norm="own").kl == pytest.approx(float(expected), rel=1e-4)
    assert not torch.equal(tuned.first.running_mean, base.first.running_mean)


def test_batch_norm_layers_are_known_by_their_names():
    base, tuned = trained(Normalised(), IMAGES), Normalised(("second", "first")).eval()
    tuned.load_state_dict(base.state_dict())
    assert DriftMeter(base, IMAGES)(tuned).kl == 0


def test_batch_norm_of_a_new_head_is_nothing_of_the_frozen_models():
    base = trained(Normalised(), IMAGES)
    meter, tuned = DriftMeter(base, IMAGES), copy.deepcopy(base)
    tuned.head = nn.Sequential(nn.BatchNorm1d(6), nn.Linear(6, 4)).eval()
    assert (meter(tuned).head, meter(tuned).kl) == ("frozen", 0)


def test_a_weight_that_is_computed_before_each_call_is_kept():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        base = nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.utils.weight_norm(nn.Linear(8, 3)))
    tuned = copy.deepcopy(nn.Sequential(nn.Linear(6, 8), nn.Tanh(), nn.Linear(8, 3)))
    tuned[0].load_state_dict(base[0].state_dict())
    tuned[2].load_state_dict({"weight": 1.1 * base[2].weight, "bias": base[2].bias})
    drift = DriftMeter(base, ROWS)(tuned)
    assert drift.head == "own"
    assert drift.kl == pytest.approx(float(kl_of(base, tuned, ROWS)), rel=1e-4)
