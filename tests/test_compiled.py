import logging

import pytest
import torch
from torch import nn

from flowdata import LossScorer
from flowdata.models import compiled
from tests import reference, zoo
from tests.models import TinyResNet, images, tiny_llama, token_samples
from tests.test_packed import prompted

CPU = torch.device("cpu")
CALL = "_compiled_call_impl"


@pytest.fixture(autouse=True)
def fresh():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def scored(model, samples, max_tokens=150, **options):
    options |= {"dtype": "float32", "max_tokens": max_tokens, "progress": False}
    scorer = LossScorer(model, **options)
    return scorer.score(samples).losses, scorer.explain()


@pytest.mark.parametrize("name", ["llama", "gemma 2"])
def test_one_graph_serves_all_layers_and_shapes(name):
    model, samples = zoo.decoder(name), prompted(token_samples(12), torch.arange(20, 40))
    expected = torch.tensor([reference.causal_lm_sample_loss(model, s)[0] for s in samples])
    torch._dynamo.utils.counters.clear()
    losses, how = scored(model, samples, compile=True)
    assert (losses - expected).abs().max() < 1e-4
    assert "samples packed, layers compiled, a prefix of 20 tokens" in how
    kinds = len(set(getattr(model.config, "layer_types", "x")))
    assert torch._dynamo.utils.counters["stats"]["unique_graphs"] <= 1 + 2 * kinds
    assert all(module._compiled_call_impl is None for module in model.modules())


def test_a_layer_that_can_not_be_compiled_runs_as_it_is(monkeypatch, caplog):
    def fails(*_, **__):
        raise NotImplementedError("this layer has no graph")

    model, samples = tiny_llama().eval(), token_samples(6)
    expected, _ = scored(model, samples)
    layer = type(model.model.layers[0])
    monkeypatch.setattr(layer, "compile", lambda self, **_: setattr(self, CALL, fails))
    losses, how = scored(model, samples, compile=True)
    assert torch.equal(losses, expected)
    assert "samples packed" in how
    assert "layers compiled" not in how
    assert "not compiling: NotImplementedError: this layer has no graph" in caplog.text


def test_a_machine_that_can_not_compile(monkeypatch, caplog):
    def fails(*_, **__):
        raise RuntimeError("no compiler here")

    monkeypatch.setattr(torch, "compile", fails)
    model, samples = tiny_llama().eval(), token_samples(6)
    with caplog.at_level(logging.WARNING):
        _, how = scored(model, samples, compile=True)
    assert "layers compiled" not in how
    assert "not compiling: RuntimeError: no compiler here" in caplog.text


def test_a_model_without_layers_is_compiled_whole():
    model, data = TinyResNet(), images(8)
    expected, _ = scored(model, data, None)
    losses, _ = scored(model, data, None, compile=True)
    torch.testing.assert_close(losses, expected, atol=1e-4, rtol=1e-4)
    assert model._compiled_call_impl is None


def test_the_callers_own_compiled_calls_come_back():
    model = tiny_llama().eval()
    model.model.layers[0].compile()
    call = model.model.layers[0]._compiled_call_impl
    with compiled.compiled_layers(model):
        assert compiled.is_compiled(model)
        assert model.model.layers[0]._compiled_call_impl is not call
    assert model.model.layers[0]._compiled_call_impl is call
    assert model.model.layers[1]._compiled_call_impl is None


def test_a_block_may_give_up_compiling(caplog):
    model = tiny_llama().eval()
    with compiled.compiled_layers(model):
        compiled.give_up(model, "the losses differ")
        assert not compiled.is_compiled(model)
        assert all(layer._compiled_call_impl is None for layer in model.model.layers)
    assert "not compiling: the losses differ" in caplog.text


def test_compiling_pays_on_long_jobs_alone():
    model, gpu = nn.Linear(1000, 1000), torch.device("cuda")
    assert not compiled.pays(model, 10_000, CPU)
    assert compiled.pays(model, 10**9, CPU)
    assert not compiled.pays(model, 10**9, gpu)
    assert compiled.pays(model, 10**12, gpu)


@pytest.mark.parametrize("has_amx", [False, True])
@pytest.mark.parametrize("has_avx", [False, True])
def test_compiling_gains_on_the_kinds_of_machine_where_it_was_measured(
    has_amx, has_avx, monkeypatch
):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_avx)
    assert compiled.gains(torch.bfloat16, CPU) is (has_amx or has_avx)
    assert compiled.gains(torch.bfloat16, torch.device("cuda"))
    assert not compiled.gains(torch.float32, torch.device("cuda"))
    assert not compiled.gains(torch.float64, CPU)


def test_a_resumed_run_keeps_the_choice_of_its_store(tmp_path, monkeypatch):
    model, samples = tiny_llama().eval(), token_samples(40)

    class Stops(list):
        def __getitem__(self, index):
            if stopping and index == 17:  # not one of those looked at first
                raise KeyboardInterrupt
            return super().__getitem__(index)

    stopping = True
    sizes = {"dataset_id": "stops", "lengths": [len(s["input_ids"]) for s in samples]}
    first = LossScorer(model, dtype="float32", max_tokens=60, compile=True, progress=False)
    with pytest.raises(KeyboardInterrupt):
        first.score(Stops(samples), store=tmp_path, **sizes)
    stopping = False
    second = LossScorer(model, dtype="float32", max_tokens=60, progress=False)
    second.score(Stops(samples), store=tmp_path, **sizes)
    assert "layers compiled" in second.explain()
