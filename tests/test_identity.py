"""Identities as stores made earlier hold them: another one would have their losses made again."""

import pytest
import torch
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.probe import compute_features
from flowdata.store.fingerprint import fingerprint_callable
from flowdata.store.format import read_file

DATA = TensorDataset(torch.arange(24.0).view(6, 4) / 24, torch.arange(6) % 3)


def model():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 - 1)
    return layer


MODEL_DIGEST = "075e3bee3473fa9ed0ee24b1d40f099631f02f41bde28abd5a25cbce26e20670"
DATA_DIGEST = "5aa17756548a3afa4be99671d7e3e9bab2bee829b4d4cdfe13839d0c3018d9e5"
NO_FUNCTION = "096938ce6ca6ab8881a1e9cd318a25e8b0eeab2beb42e077767e9d2939146d31"


class Loss:
    def __init__(self, factor):
        self.factor = factor

    def __call__(self, model, batch):
        return self.factor * nn.functional.cross_entropy(
            model(batch[0]), batch[1], reduction="none"
        )


def test_the_identity_of_scores_stays_what_it_was():
    scorer = LossScorer(model(), dtype="float32", progress=False)
    identity = scorer.score(DATA).metadata["identity"]
    assert list(identity.items()) == [
        ("dataset", f"content:2:{DATA_DIGEST}"),
        ("num_samples", 6),
        ("loss", "cross_entropy"),
        ("reference", "model"),
        ("token_losses", False),
        ("collate_fn", NO_FUNCTION),
        ("dtype", "float32"),
        ("model", f"2:{MODEL_DIGEST}"),
    ]


def _with_other_adapter(net):
    net[0].set_adapter("default")


def _with_other_setting(net):
    net.scale = 100.0


def _with_other_data(net):
    net.weight.data.mul_(-3)


class Scaled(nn.Linear):
    scale = 1.0

    def forward(self, x):
        return super().forward(x * self.scale)


def adapted():
    from peft import LoraConfig, inject_adapter_in_model

    config = LoraConfig(target_modules=["0"], init_lora_weights=False)
    net = inject_adapter_in_model(config, nn.Sequential(nn.Linear(4, 3)))
    return inject_adapter_in_model(config, net, adapter_name="second")


@pytest.mark.parametrize(
    ("build", "change"),
    [
        (lambda: Scaled(4, 3), _with_other_setting),
        (lambda: Scaled(4, 3), _with_other_data),
        (adapted, _with_other_adapter),
    ],
)
def test_scores_tell_the_model_as_it_was_when_they_were_made(build, change):
    """No count of PyTorch's rises with these changes."""
    net = build()
    scorer = LossScorer(net, "cross_entropy", dtype="float32", progress=False)
    before = scorer.score(DATA)
    change(net)
    after = scorer.score(DATA)
    assert not torch.equal(after.losses, before.losses)
    assert after.metadata["identity"]["model"] != before.metadata["identity"]["model"]
    anew = LossScorer(net, "cross_entropy", dtype="float32", progress=False).score(DATA)
    assert after.metadata["identity"] == anew.metadata["identity"]


def test_the_identity_of_further_columns_and_names_stays_what_it_was():
    scorer = LossScorer(
        model(), "cross_entropy", columns=["entropy"], token_losses=True, progress=False
    )
    identity = scorer.score(DATA, dataset_id="mine").metadata["identity"]
    assert list(identity.items()) == [
        ("dataset", "mine"),
        ("num_samples", 6),
        ("loss", "cross_entropy"),
        ("reference", "model"),
        ("token_losses", True),
        ("collate_fn", NO_FUNCTION),
        ("dtype", "float32"),
        ("columns", ["entropy"]),
        ("model", f"2:{MODEL_DIGEST}"),
    ]


def test_the_identity_of_a_loss_of_the_users_own_is_what_it_does():
    """Its digest is not pinned, since bytecode depends on the version of Python."""
    first, same, other = (
        LossScorer(model(), Loss(factor), progress=False).score(DATA).metadata["identity"]["loss"]
        for factor in (1.0, 1.0, 2.0)
    )
    assert first == same == f"callable:{fingerprint_callable(Loss(1.0))}"
    assert other != first


def test_the_identity_of_features_stays_what_it_was(tmp_path):
    for name, dataset_id in (("content", None), ("named", "mine")):
        file = tmp_path / f"{name}.safetensors"
        compute_features(
            model(), DATA, dtype="float32", store=file, dataset_id=dataset_id, progress=False
        )
    content, named = (read_file(file)[1]["identity"] for file in sorted(tmp_path.iterdir()))
    assert content == {
        "kind": "features",
        "body": f"2:{MODEL_DIGEST}",
        "dataset": f"content:2:{DATA_DIGEST}",
        "num_samples": 6,
        "collate_fn": NO_FUNCTION,
        "dtype": "float32",
    }
    assert named == content | {"dataset": "mine"}
