"""Nothing waits for the device: shown on the meta device, whose values nobody can look at."""

import pytest
import torch
from torch import nn

from flowdata import LossScorer
from flowdata.scoring import run
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.language import attention
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.language.ways import ways_of
from flowdata.targets.predictions import prediction_way
from flowdata.targets.target_losses import Fetched
from tests.models import tiny_gpt2, tiny_llama, token_samples
from tests.test_packed import prompted

META = torch.device("meta")


def on_meta(model):
    with torch.no_grad():
        return model.eval().to(META)


@pytest.mark.parametrize("columns", [(), ("entropy", "correct", "gradient_norm")])
@pytest.mark.parametrize("make", [tiny_llama, tiny_gpt2])
@pytest.mark.parametrize("way", ["packed", "padded"])
def test_no_way_to_score_tokens_looks_at_what_the_device_has(make, way, columns, monkeypatch):
    # An operator of PyTorch's own library would not be run on the meta device.
    monkeypatch.setattr(attention, "_over_blocks", attention._over_blocks._init_fn)
    if way == "padded":  # then transformers itself looks, once a call, whether samples are packed
        monkeypatch.setattr(
            "transformers.masking_utils.find_packed_sequence_indices", lambda _: None
        )
    prefix = torch.arange(20, 60)
    samples = prompted(token_samples(6), prefix)
    packing = Packing(padded("causal_lm"), prefix, device=META)
    model = on_meta(make())
    packings = [("samples packed", packing)] if way == "packed" else []
    tiled, through_head, *_ = ways_of(
        model, "causal_lm", packings=packings, columns=columns, device=META
    )
    for name, method in [tiled] if columns else [tiled, through_head]:
        with torch.no_grad():
            losses = method(model, pad_collate(samples))
        assert losses.values.device == META, name
        assert losses.counts.tolist() == [(s["labels"][1:] != -100).sum() for s in samples]
        assert set(losses.further) == set(columns)


@pytest.mark.parametrize("loss", ["cross_entropy", "binary_cross_entropy", "mse"])
def test_no_prediction_loss_looks_at_what_the_device_has(loss):
    targets = {
        "cross_entropy": torch.tensor([1, -100, 2, 0]),
        "binary_cross_entropy": torch.ones(4, 3),
        "mse": torch.ones(4, 3),
    }[loss]
    method = prediction_way(loss, device=META)
    losses = method(on_meta(nn.Linear(5, 3)), (torch.randn(4, 5), targets))
    assert losses.values.device == META
    assert losses.counts.tolist() == ([1, 0, 1, 1] if loss == "cross_entropy" else [3] * 4)


def test_a_look_would_be_noticed():
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones(3, device=META)[torch.ones(3, device=META) > 0]
    with pytest.raises((RuntimeError, NotImplementedError)):
        torch.ones((), device=META).item()


def test_a_pack_is_begun_before_the_one_before_it_is_waited_for(monkeypatch):
    order = []

    class Logged(Fetched):
        def __init__(self, losses):
            self.number = sum(kind == "begun" for kind, _ in order)
            order.append(("begun", self.number))
            super().__init__(losses)

        def columns(self, **options):
            order.append(("waited for", self.number))
            return super().columns(**options)

    samples = token_samples(24)
    scorer = LossScorer(tiny_llama(), dtype="float32", max_tokens=128, progress=False)
    expected = scorer.score(samples)
    monkeypatch.setattr(run, "Fetched", Logged)
    finish_packs = run._finish_packs
    monkeypatch.setattr(run, "_finish_packs", lambda started, ahead: finish_packs(started, ahead=1))
    assert torch.equal(scorer.score(samples).losses, expected.losses)
    packs = len(order) // 2
    assert packs > 3
    assert order[:4] == [("begun", 0), ("begun", 1), ("waited for", 0), ("begun", 2)]
    assert [number for kind, number in order if kind == "waited for"] == list(range(packs))
