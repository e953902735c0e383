"""Models that accelerate has spread over devices; sharded ones are in test_ranks.py."""

import pytest
import torch

from flowdata import LossScorer
from flowdata.store.fingerprint import fingerprint_model
from tests.models import tiny_llama, token_samples


def offloaded(model, folder):
    from accelerate import cpu_offload

    return cpu_offload(model, execution_device=torch.device("cpu"))


def dispatched(model, folder):
    from accelerate import dispatch_model

    device_map = {"model.embed_tokens": "cpu", "model.layers.0": "cpu", "model.layers.1": "disk"}
    device_map |= {"model.norm": "cpu", "model.rotary_emb": "cpu", "lm_head": "cpu"}
    return dispatch_model(
        model, device_map, main_device="cpu", offload_dir=folder, force_hooks=True
    )


@pytest.mark.parametrize("spread", [offloaded, dispatched])
def test_a_model_spread_over_devices_scores_as_it_is(spread, tmp_path):
    samples = token_samples(12)
    expected = LossScorer(tiny_llama(), dtype="float32", progress=False).score(
        samples, store=tmp_path / "s"
    )
    model = spread(tiny_llama(), tmp_path / "offloaded")
    devices = [parameter.device for parameter in model.parameters()]
    assert torch.device("meta") in devices
    scores = LossScorer(model, progress=False).score(samples)
    # Offloaded heads can't be read tile by tile: another way is taken, with other last bits.
    assert (scores.losses - expected.losses).abs().max() < 1e-5
    assert [parameter.device for parameter in model.parameters()] == devices
    assert fingerprint_model(model) == fingerprint_model(tiny_llama())
    again = LossScorer(model, progress=False).score(samples, store=tmp_path / "s")
    assert torch.equal(again.losses, expected.losses)  # it is the same model to the store


def test_it_is_neither_moved_nor_converted(tmp_path):
    model = offloaded(tiny_llama(), tmp_path)
    for options in ({"dtype": "bfloat16"}, {"device": "cpu"}):
        with pytest.raises(ValueError, match="is scored as and where it is: leave device=None"):
            LossScorer(model, progress=False, **options)
