"""Attention by products, on the CPUs where PyTorch's kernel is slow."""

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from flowdata import LossScorer
from flowdata.models.tensors import CPU
from flowdata.scoring import planning
from flowdata.scoring.language import attention, blocks, packable, products
from flowdata.scoring.language.blocks import Block
from flowdata.scoring.language.masks import Masks
from flowdata.scoring.language.products import attend_by_products, products_gain
from tests import reference
from tests.models import tiny_llama, token_samples
from tests.test_columns import gemma


def attended(q, k, v, scaling, window):
    """Attention by products, (samples, H, length, d_v), written into strides as a pack has them."""
    samples, heads, length, _ = q.shape
    output = q.new_empty(samples, length, heads, v.shape[3]).transpose(1, 2)
    attend_by_products(q, k, v, scaling, window, Masks(), output)
    return output


@pytest.fixture
def unwritten_memory_is_nan():
    torch.use_deterministic_algorithms(True)  # which fills new memory with NaN
    yield
    torch.use_deterministic_algorithms(False)


@given(
    samples=st.integers(1, 3),
    length=st.integers(1, 20),
    before=st.integers(0, 5),
    window=st.none() | st.integers(1, 24),
    heads=st.sampled_from([(4, 4), (4, 2), (6, 1)]),
    rows=st.sampled_from([1, 3, 8, 64]),
    at_once=st.sampled_from([1, 64, 2**21]),
)
@settings(max_examples=60, deadline=None)
def test_products_are_attention(samples, length, before, window, heads, rows, at_once):
    generator = torch.Generator().manual_seed(length)
    count, groups = heads
    sizes = [(count, length, 8), (groups, before + length, 8), (groups, before + length, 6)]
    q, k, v = (torch.randn(samples, *size, generator=generator) for size in sizes)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(products, "_ROWS", rows)
        patch.setattr(products, "_SCORES", at_once)
        out = attended(q, k, v, 0.3, window)
    for sample in range(samples):
        expected = reference.attention(q[sample], k[sample], v[sample], 0.3, window=window)
        torch.testing.assert_close(out[sample].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.usefixtures("unwritten_memory_is_nan")
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_memory_that_is_used_again_leaves_nothing_behind(dtype):
    q, k, v = (torch.randn(2, 2, 150, 8).to(dtype) for _ in range(3))
    out = attended(q, k, v, 0.3, None)
    again = attended(q[:1], k[:1], v[:1], 0.3, None)
    torch.testing.assert_close(out[:1], again, atol=1e-2, rtol=1e-2)
    assert out.isfinite().all()


@pytest.mark.parametrize("window", [None, 6])
def test_blocks_behind_a_prefix_and_a_prompt(window):
    generator = torch.Generator().manual_seed(0)
    q, k, v = (torch.randn(1, heads, 25, 8, generator=generator) for heads in (4, 2, 2))
    prefix = tuple(torch.randn(1, 2, 5, 8, generator=generator) for _ in range(2))
    shape = [Block(1, 9), Block(2, 5, after=0), Block(1, 6)]
    options = blocks.AttentionOptions(0.3, window, None, None)
    both = [
        blocks.attend_by_block(shape, q, k, v, prefix, options, Masks(), by_products=by_products)
        for by_products in (False, True)
    ]
    torch.testing.assert_close(*both, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize(
    ("has_amx", "has_bfloat16", "gain"),
    [(False, True, True), (True, True, False), (False, False, False)],
)
def test_products_gain_where_it_was_measured(has_amx, has_bfloat16, gain, monkeypatch):
    monkeypatch.setattr(torch.cpu, "_is_amx_tile_supported", lambda: has_amx)
    monkeypatch.setattr(torch.cpu, "_is_avx512_bf16_supported", lambda: has_bfloat16)
    assert products_gain(torch.bfloat16, CPU) is gain
    assert not products_gain(torch.float32, CPU)
    assert not products_gain(torch.bfloat16, torch.device("cuda"))


def scored(samples, gain, patch, model=None, max_tokens=None, **options):
    patch.setattr(planning, "products_gain", lambda *_: gain)
    model = tiny_llama().eval() if model is None else model
    scorer = LossScorer(model, "causal_lm", dtype="bfloat16", max_tokens=max_tokens, progress=False)
    return scorer.score(samples, dataset_id="products", **options).losses, scorer.explain()


def test_losses_by_products(monkeypatch):
    samples = token_samples(30)
    by_products, how = scored(samples, True, monkeypatch)
    by_kernel, other = scored(samples, False, monkeypatch)
    assert "samples packed, attention by products" in how
    assert "products" not in other
    truth = [reference.causal_lm_sample_loss(tiny_llama().eval(), each)[0] for each in samples]
    errors = [(losses - torch.tensor(truth)).abs().max() for losses in (by_products, by_kernel)]
    assert errors[0] <= 2 * errors[1]


def test_wrong_products_are_not_taken(monkeypatch, caplog):
    def unmasked(q, k, v, *_):
        return torch.nn.functional.scaled_dot_product_attention(q, k, v, enable_gqa=True)

    monkeypatch.setattr(blocks, "attend_by_products", unmasked)
    losses, how = scored(token_samples(30), True, monkeypatch)
    assert "a tiled head, samples packed, attention by products: a sample's loss" in caplog.text
    assert "samples packed" in how
    assert "products" not in how
    monkeypatch.undo()
    assert torch.equal(losses, scored(token_samples(30), False, monkeypatch)[0])


def test_a_store_keeps_the_way_that_it_was_begun_with(tmp_path, monkeypatch):
    stopping = True

    class Stops(list):
        def __getitem__(self, index):
            if stopping and index == 17:  # not one of those looked at first
                raise KeyboardInterrupt
            return super().__getitem__(index)

    samples = Stops(token_samples(40))
    lengths = [len(s["input_ids"]) for s in token_samples(40)]
    options = {"lengths": lengths, "store": tmp_path, "max_tokens": 60}
    with pytest.raises(KeyboardInterrupt):
        scored(samples, True, monkeypatch, **options)
    stopping = False
    losses, how = scored(samples, False, monkeypatch, **options)
    assert "attention by products" in how
    whole, _ = scored(samples, True, monkeypatch, lengths=lengths, max_tokens=60)
    assert torch.equal(losses, whole)


def test_models_whose_attention_is_capped_do_without(monkeypatch):
    def refuse(*_):
        raise AssertionError

    monkeypatch.setattr(blocks, "attend_by_products", refuse)
    q, k, v = (torch.randn(1, 2, 6, 8) for _ in range(3))
    run = attention.Pass([Block(1, 6)], by_products=True)
    token = attention._running.set(run)
    capped = attention._over_blocks(q, k, v, 0.3, None, 0.8, None)
    attention._running.reset(token)
    expected = reference.attention(q[0], k[0], v[0], 0.3, softcap=0.8).transpose(0, 1)
    torch.testing.assert_close(capped[0].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("cap", [50.0, None])
def test_products_are_named_where_they_are_made(cap, monkeypatch):
    model = gemma(attn_logit_softcapping=cap)
    _, how = scored(token_samples(12), True, monkeypatch, model)
    assert "samples packed" in how
    assert ("products" in how) is (cap is None)


def test_a_sink_is_no_plain_attention():
    model = tiny_llama()
    assert packable.has_plain_attention(model)
    model.model.layers[0].self_attn.register_parameter("sinks", torch.nn.Parameter(torch.zeros(4)))
    assert not packable.has_plain_attention(model)
