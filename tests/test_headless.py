"""Networks whose output layer was cut off, beside those with output layers of every kind."""

import logging

import pytest
import torch
import torch.nn.functional as F
import transformers
from torch import nn

from flowdata.drift import DriftMeter, inverted_images, smooth_images
from flowdata.drift.headless import check_has_head

SHAPE = (3, 16, 16)
STEEP = 20  # times as large weights, for outputs that nobody takes for probabilities
PROBE = smooth_images(SHAPE, 8)


@pytest.fixture(autouse=True)
def _each_by_itself(monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr("flowdata._common.notices._said", set())


def convolutional():
    layers = nn.Sequential(nn.Conv2d(3, 8, 3), nn.BatchNorm2d(8), nn.ReLU())
    nn.init.constant_(layers[1].weight, STEEP)
    return layers


class Residual(nn.Module):
    """A residual network that activates and pools by functions."""

    def __init__(self, fc):
        super().__init__()
        self.stem, self.block = convolutional(), nn.Conv2d(8, 8, 3, padding=1)
        self.norm, self.fc = nn.BatchNorm2d(8), fc

    def forward(self, x):
        x = self.stem(x)
        x = F.relu(x + self.norm(self.block(x)), inplace=True)
        return self.fc(torch.flatten(F.adaptive_avg_pool2d(x, 1), 1))


class Tokens(nn.Module):
    """A network of patches, normalised as in transformers, that reads one of them off."""

    def __init__(self, head):
        super().__init__()
        self.patches = nn.Conv2d(3, 16, 4, stride=4)
        self.layer, self.norm = nn.LayerNorm(16), nn.LayerNorm(16)
        self.head = head

    def forward(self, x):
        x = self.layer(self.patches(x).flatten(2).mT)
        return self.head(self.norm(x + x.relu())[:, 0])


class Products(nn.Module):
    """Products with a parameter of its own, and what may be done to them."""

    def __init__(self, then=lambda z: z, end=None):
        super().__init__()
        self.body, self.weight = convolutional(), nn.Parameter(torch.randn(8, 5))
        self.then, self.end = then, end or nn.Identity()

    def forward(self, x):
        return self.end(self.then(self.body(x).mean((2, 3)) @ self.weight))


class Two(nn.Module):
    """The mean of two heads, of which no layer makes the logits."""

    def __init__(self):
        super().__init__()
        self.body, self.one, self.other = convolutional(), nn.Linear(8, 5), nn.Linear(8, 5)

    def forward(self, x):
        x = self.body(x).mean((2, 3))
        return (self.one(x) + self.other(x)) / 2


def hugging_face(labels):
    config = transformers.ResNetConfig(
        layer_type="basic", embedding_size=8, hidden_sizes=[8, 8], depths=[1, 1], num_labels=labels
    )
    return transformers.ResNetForImageClassification(config)


def pooled(*end):
    return nn.Sequential(convolutional(), nn.AdaptiveAvgPool2d(1), nn.Flatten(), *end)


FLAT = (nn.Flatten(), nn.Linear(768, 8), nn.ReLU())
POOL = (nn.AdaptiveAvgPool2d(1), nn.Flatten())
CUT = {
    "residual": (lambda: Residual(nn.Identity()), "'fc' passes on what BatchNorm2d 'norm' made"),
    "transformer": (lambda: Tokens(nn.Identity()), "'head' passes on what LayerNorm 'norm' made"),
    "Hugging Face": (lambda: hugging_face(0), r"'classifier\.1' passes on"),
    "norm and pool": (lambda: pooled(nn.Identity()), "'3' passes on"),
    "one of two layers": (
        lambda: nn.Sequential(*FLAT, nn.Dropout(), nn.Identity()),
        "'4' passes on what ReLU '2' made",
    ),
    "a head of layers": (
        lambda: pooled(nn.Sequential(nn.LayerNorm(8), nn.Dropout(), nn.Identity())),
        r"'3\.2' passes on what LayerNorm '3\.0' made",
    ),
}
WHOLE = {
    "residual": lambda: Residual(nn.Linear(8, 5)),
    "transformer": lambda: Tokens(nn.Linear(16, 5)),
    "Hugging Face": lambda: hugging_face(5),
    "linear, then Identity": lambda: pooled(nn.Linear(8, 5), nn.Dropout(), nn.Identity()),
    "a head of layers": lambda: nn.Sequential(*FLAT, nn.Sequential(nn.Linear(8, 5), nn.Identity())),
    "products": Products,
    "products and a bias": lambda: Products(lambda z: z + torch.ones(5)),
    "log-probabilities": lambda: Products(lambda z: z.log_softmax(1)),
    "capped": lambda: Products(lambda z: 30 * (z / 30).tanh()),
    "two heads": Two,
    "a convolution": lambda: nn.Sequential(
        convolutional(), nn.AdaptiveAvgPool2d(1), nn.Conv2d(8, 5, 1), nn.Flatten(), nn.Identity()
    ),
    "a convolution, pooled": lambda: nn.Sequential(
        convolutional(), nn.Conv2d(8, 5, 1), *POOL, nn.Identity()
    ),
    "SqueezeNet's": lambda: nn.Sequential(
        convolutional(), nn.Conv2d(8, 5, 1), nn.ReLU(inplace=True), *POOL
    ),
}


@pytest.mark.parametrize("kind", CUT)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_network_whose_output_layer_was_cut_off_is_refused(kind, dtype):
    make, words = CUT[kind]
    with pytest.raises(ValueError, match=f"it returns features: its nn.Identity {words}") as caught:
        DriftMeter(make(), PROBE, dtype=dtype)
    assert "pass the network with its old output layer, such as nn.Sequential(" in str(caught.value)


@pytest.mark.parametrize("kind", WHOLE)
def test_output_layers_of_every_kind_are_none_that_were_cut_off(kind, caplog):
    model = WHOLE[kind]()
    with caplog.at_level(logging.WARNING, "flowdata"):
        assert DriftMeter(model, PROBE)(model).kl == 0
        if any(isinstance(module, nn.BatchNorm2d) for module in model.modules()):
            inverted_images(model, SHAPE, 32, steps=1)
    assert caplog.text == ""


def test_the_old_output_layer_mends_it_and_nothing_stays_on_the_network():
    body, head = Residual(nn.Identity()), nn.Linear(8, 5)
    for measure in (DriftMeter, lambda model, _: inverted_images(model, SHAPE, 32, steps=1)):
        with pytest.raises(ValueError, match=r"its nn\.Identity 'fc' passes on what"):
            measure(body, PROBE)
        measure(nn.Sequential(body, head), PROBE)
    assert not any(module._forward_hooks for module in body.modules())


def test_layers_that_are_compiled_are_followed_as_well():
    body = Residual(nn.Identity()).eval()
    body.stem.compile()
    with pytest.raises(ValueError, match=r"its nn\.Identity 'fc' passes on"):
        DriftMeter(body, PROBE, dtype="float32")


def test_a_network_that_fails_is_not_judged_by_the_layers_that_ran():
    def fail():
        body(torch.randn(1, *SHAPE))
        raise RuntimeError

    body = Residual(nn.Identity()).eval()
    check_has_head(body, fail)
