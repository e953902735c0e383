"""Identities as stores made earlier hold them: another one would have their losses made again."""

import torch
from torch import nn
from torch.utils.data import TensorDataset

from flowdata import LossScorer
from flowdata.probe import compute_features
from flowdata.store.format import read_file

DATA = TensorDataset(torch.arange(24.0).view(6, 4) / 24, torch.arange(6) % 3)


def model():
    layer = nn.Linear(4, 3)
    with torch.no_grad():
        for parameter in layer.parameters():
            parameter.copy_(torch.arange(parameter.numel()).view_as(parameter) / 7 - 1)
    return layer


MODEL_DIGEST = "b395cacaa8e5e7855fb429f42e3beb894370a50bb0b636270bfbe5a40ea1acf7"
DATA_DIGEST = "5aa17756548a3afa4be99671d7e3e9bab2bee829b4d4cdfe13839d0c3018d9e5"
NO_FUNCTION = "c943f9ef97436877dcbf0d6fd233d8bd45ed68fa9b25c700f1dc585b024e4e50"
LOSS_DIGEST = "eca168acf78153a5ca712c85a654d45c762af87136c2cd09904ae8c621441790"


class Loss:
    """A loss whose fingerprint does not depend on the version of Python."""

    def __init__(self):
        self.reduction = "none"

    def __call__(self, model, batch):
        return nn.functional.cross_entropy(model(batch[0]), batch[1], reduction=self.reduction)


def test_the_identity_of_scores_stays_what_it_was():
    scorer = LossScorer(model(), dtype="float32", progress=False)
    identity = scorer.score(DATA).metadata["identity"]
    assert list(identity.items()) == [
        ("dataset", f"content:{DATA_DIGEST}"),
        ("num_samples", 6),
        ("loss", "cross_entropy"),
        ("reference", "model"),
        ("token_losses", False),
        ("collate_fn", NO_FUNCTION),
        ("dtype", "float32"),
        ("model", MODEL_DIGEST),
    ]


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
        ("model", MODEL_DIGEST),
    ]


def test_the_identity_of_a_loss_of_the_users_own_stays_what_it_was():
    identity = LossScorer(model(), Loss(), progress=False).score(DATA).metadata["identity"]
    assert identity["loss"] == f"callable:{LOSS_DIGEST}"


def test_the_identity_of_features_stays_what_it_was(tmp_path):
    for name, dataset_id in (("content", None), ("named", "mine")):
        file = tmp_path / f"{name}.safetensors"
        compute_features(
            model(), DATA, dtype="float32", store=file, dataset_id=dataset_id, progress=False
        )
    content, named = (read_file(file)[1]["identity"] for file in sorted(tmp_path.iterdir()))
    assert content == {
        "kind": "features",
        "body": MODEL_DIGEST,
        "dataset": f"content:{DATA_DIGEST}",
        "num_samples": 6,
        "collate_fn": NO_FUNCTION,
        "dtype": "float32",
    }
    assert named == content | {"dataset": "mine"}
