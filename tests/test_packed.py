import math
from contextlib import contextmanager

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import nn

from flowdata import LossScorer
from flowdata.scoring import run as scoring_run
from flowdata.scoring.collate import pad_collate
from flowdata.scoring.language import attention, blocks, packed, varlen
from flowdata.scoring.language.blocks import Block
from flowdata.scoring.language.inputs import padded
from flowdata.scoring.language.layout import cut_by_length
from flowdata.scoring.language.packable import common_prefix, why_not_packed
from flowdata.scoring.language.packed import Packing
from flowdata.scoring.plan.prompts import shared_prompts
from tests import reference, zoo
from tests.models import tiny_llama, token_samples

BLOCKS = [Block(2, 9), Block(1, 4), Block(3, 1)]
HEADS, GROUPS, WIDTH = 4, 2, 8


class Layer(nn.Module):
    is_causal = True


def parts(seed=0, before=0):
    """Queries, keys and values of `BLOCKS`, and keys and values of a prefix."""
    generator = torch.Generator().manual_seed(seed)
    tokens = sum(count * length for count, length, _ in BLOCKS)
    flat = [
        torch.randn(1, tokens, heads, WIDTH, generator=generator).transpose(1, 2)
        for heads in (HEADS, GROUPS, GROUPS)
    ]
    prefix = [torch.randn(1, GROUPS, before, WIDTH, generator=generator) for _ in range(2)]
    return flat, prefix


def expected_attention(flat, prefix, **options):
    outs, start = [], 0
    for length in [length for count, length, _ in BLOCKS for _ in range(count)]:
        q, k, v = (each[0, :, start : start + length] for each in flat)
        k, v = (torch.cat([p[0], own], 1) for p, own in zip(prefix, (k, v), strict=True))
        outs.append(reference.attention(q, k, v, 0.3, **options).transpose(0, 1))
        start += length
    return torch.cat(outs)


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"window": 4},
        {"softcap": 0.8},
        {"sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
        {"window": 6, "softcap": 0.8, "sinks": torch.tensor([0.5, -1.0, 2.0, 0.0])},
    ],
    ids=lambda options: "+".join(options) or "plain",
)
@pytest.mark.parametrize("at_once", [blocks._SCORES_AT_ONCE, 64])
def test_samples_attend_to_themselves_and_the_prefix(before, options, at_once, monkeypatch):
    monkeypatch.setattr(blocks, "_SCORES_AT_ONCE", at_once)
    flat, prefix = parts(before=before)
    token = attention._running.set(attention.Pass(BLOCKS, [tuple(prefix)] if before else []))
    names = {"window": "sliding_window", "sinks": "s_aux"}
    given_options = {names.get(name, name): value for name, value in options.items()}
    out, _ = attention._attend(Layer(), *flat, None, scaling=0.3, **given_options)
    attention._running.reset(token)
    expected = expected_attention(flat, prefix, **options)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("window", [None, 6])
def test_the_cpus_kernel_gets_keys_in_multiples_of_sixteen(before, window, monkeypatch):
    flat, prefix = parts(before=before)
    flat, prefix = ([x.bfloat16() for x in group] for group in (flat, prefix))
    kernel, keys = torch.nn.functional.scaled_dot_product_attention, []

    def spy(q, k, v, *args, **options):
        keys.append((k.shape[2], v.shape[2]))
        return kernel(q, k, v, *args, **options)

    monkeypatch.setattr(torch.nn.functional, "scaled_dot_product_attention", spy)
    token = attention._running.set(attention.Pass(BLOCKS, [tuple(prefix)] if before else []))
    out, _ = attention._attend(Layer(), *flat, None, scaling=0.3, sliding_window=window)
    attention._running.reset(token)
    exact = [[x.float() for x in group] for group in (flat, prefix)]
    expected = expected_attention(*exact, **({} if window is None else {"window": window}))
    torch.testing.assert_close(out[0].double(), expected, atol=0.02, rtol=0.02)
    assert len(keys) == len(BLOCKS)
    assert all(k == v and k % 16 == 0 for k, v in keys)


def slow_kernel(q, k, v, cu_q, cu_k, max_q, max_k, scale, left):
    assert cu_q.dtype == cu_k.dtype == torch.int32
    assert (max_q, max_k) == (int(cu_q.diff().max()), int(cu_k.diff().max()))
    outs = []
    for (a, b), (c, d) in zip(cu_q.unfold(0, 2, 1), cu_k.unfold(0, 2, 1), strict=True):
        heads = (x.transpose(0, 1) for x in (q[a:b], k[c:d], v[c:d]))
        reach = None if left < 0 else left + 1
        outs.append(reference.attention(*heads, scale, window=reach).transpose(0, 1))
    return torch.cat(outs).to(q.dtype)


def old_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, is_causal=False):
    assert is_causal
    if key.shape[1] != query.shape[1]:
        raise RuntimeError("no grouped heads")
    return slow_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, WIDTH**-0.5, -1)


def new_kernel(
    query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, *, scale, window_size, enable_gqa
):
    assert enable_gqa
    assert window_size[1] == 0
    return slow_kernel(query, key, value, cu_seq_q, cu_seq_k, max_q, max_k, scale, window_size[0])


@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("window", [None, 6])
def test_answers_attend_to_their_prompt_alone(before, window, monkeypatch):
    flat, prefix = parts(before=before)
    prompted_blocks = [Block(1, 9), Block(2, 5, after=0), Block(1, 6)]
    starts = [(0, 9, None), (9, 5, 0), (14, 5, 0), (19, 6, None)]
    expected = []
    for start, length, prompt in starts:
        q, k, v = (each[0, :, start : start + length] for each in flat)
        visible = [(k, v)] if prompt is None else [tuple(e[0, :, :9] for e in flat[1:]), (k, v)]
        visible = [tuple(each[0] for each in prefix), *visible]
        k, v = (torch.cat(each, 1) for each in zip(*visible, strict=True))
        expected.append(reference.attention(q, k, v, 0.3, window=window).transpose(0, 1))
    expected = torch.cat(expected)
    flat = [each[:, :, :25] for each in flat]
    token = attention._running.set(
        attention.Pass(prompted_blocks, [tuple(prefix)] if before else [])
    )
    out, _ = attention._attend(Layer(), *flat, None, scaling=0.3, sliding_window=window)
    attention._running.reset(token)
    torch.testing.assert_close(out[0].double(), expected, atol=1e-5, rtol=1e-4)
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", new_kernel)
    out = varlen.varlen(prompted_blocks, *flat, tuple(prefix) if before else None, 0.3, window)
    torch.testing.assert_close(out.double(), expected, atol=1e-5, rtol=1e-4)


@pytest.mark.parametrize("release", ["2.10", "2.13"])
@pytest.mark.parametrize("before", [0, 5])
@pytest.mark.parametrize("window", [None, 6])
def test_the_gpu_kernel_is_given_what_it_documents(release, before, window, monkeypatch):
    """The kernel runs on GPUs alone; here a slow one with its signature takes its place."""

    kernel = {"2.10": old_kernel, "2.13": new_kernel}[release]
    monkeypatch.setattr("torch.nn.attention.varlen.varlen_attn", kernel)
    flat, prefix = parts(before=before)
    arguments = (BLOCKS, *flat, tuple(prefix) if before else None, 0.3, window)
    if release == "2.10" and window is not None:
        with pytest.raises(ValueError, match="has no sliding window"):
            varlen.varlen(*arguments)
        return
    expected = expected_attention(flat, prefix, window=window)
    torch.testing.assert_close(varlen.varlen(*arguments).double(), expected, atol=1e-5, rtol=1e-4)


@given(st.lists(st.integers(1, 60), min_size=1, max_size=40), st.sampled_from([0, 1 / 16, 0.5]))
def test_blocks_hold_every_sample_in_order_with_little_padding(lengths, most_padding):
    runs = cut_by_length(lengths, most_padding)
    assert sum(count for count, _ in runs) == len(lengths)
    start = 0
    for count, longest in runs:
        inside = lengths[start : start + count]
        assert max(inside) == longest
        assert min(inside) >= longest * (1 - most_padding)
        start += count


# --- what is run -----------------------------------------------------------------------------


@contextmanager
def counted_runs(layer):
    """Tokens of each call of a layer: before the packs are run, and then."""
    before, packs = [], []
    agreed_way = scoring_run.agreed_way

    def agreed_first(*args):
        agreed = agreed_way(*args)
        before.extend(packs)
        packs.clear()
        return agreed

    handle = layer.register_forward_hook(lambda _, args, __: packs.append(args[0].shape[1]))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(scoring_run, "agreed_way", agreed_first)
        yield before, packs
    handle.remove()


def tokens_run(model, samples, **options):
    """(losses, tokens that went through the model's layers while packs were run, explanation)."""
    scorer = LossScorer(model, "causal_lm", dtype="float32", progress=False, **options)
    with counted_runs(model.model.norm) as (before, packs):
        losses = scorer.score(samples, dataset_id="counted").losses
    return losses, [tokens for tokens in before if tokens == 40][:1] + packs, scorer.explain()


def losses_alone(model, samples):
    return torch.tensor([reference.causal_lm_sample_loss(model, s)[0] for s in samples])


def wild_llama():
    return zoo.decoder("llama").eval()


def prompted(samples, template):
    """Samples behind a template."""
    none = torch.full_like(template, -100)
    return [
        {
            "input_ids": torch.cat([template, sample["input_ids"]]),
            "labels": torch.cat([none, sample["labels"]]),
        }
        for sample in samples
    ]


def test_nothing_behind_the_last_target_is_run():
    model, samples = wild_llama(), token_samples(9)
    for sample in samples:
        sample["labels"][-2:] = -100
    losses, run, _ = tokens_run(model, samples, batch_size=1)
    assert (losses - losses_alone(model, samples)).nan_to_num().abs().max() < 1e-4
    ends = [max(1, int((s["labels"] != -100).nonzero().max())) for s in samples]
    assert sorted(run[-9:]) == sorted(ends)  # the last target's own token is not needed either


def test_a_common_prefix_is_run_once():
    model, template = wild_llama(), torch.arange(20, 60)
    samples = prompted(token_samples(20), template)
    losses, run, how = tokens_run(model, samples, max_tokens=100)
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    assert "a prefix of 40 tokens run once (760 tokens saved)" in how
    assert run.count(40) == 1
    longest = max(len(sample["input_ids"]) for sample in samples) - 40
    assert max(run[-5:]) <= max(100, longest)


def test_packs_that_share_less_of_the_prefix_use_what_they_share():
    model, template = wild_llama(), torch.arange(20, 60)
    samples = prompted(token_samples(32), template)
    samples[1]["input_ids"][30] = 9  # of those not looked at
    samples[3]["input_ids"][3] = 9
    losses, _, how = tokens_run(model, samples, max_tokens=100)
    assert "a prefix of 40 tokens" in how
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4


def test_a_prefix_never_reaches_into_what_targets_need():
    model = wild_llama()
    samples = prompted(token_samples(8), torch.arange(20, 60))
    for sample in samples:
        sample["labels"][20:] = sample["input_ids"][20:]
    losses, _, how = tokens_run(model, samples)
    assert "a prefix of 19 tokens" in how
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    samples[1]["labels"][2] = samples[1]["input_ids"][2]
    assert "prefix" not in tokens_run(model, samples)[2]


@pytest.mark.parametrize("name", ["mistral", "gemma 2", "gpt-oss"])
def test_a_prefix_longer_than_the_window(name):
    model = zoo.decoder(name)
    samples = prompted(token_samples(8), torch.arange(20, 60))
    scorer = LossScorer(model, dtype="float32", progress=False)
    losses = scorer.score(samples).losses
    assert "a prefix of 40 tokens" in scorer.explain()
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4


@pytest.mark.parametrize("unreadable", [0, 1, 30])
def test_a_prefix_in_spite_of_samples_that_can_not_be_read(unreadable):
    class Holed(list):
        def __getitem__(self, index):
            if index == unreadable:
                raise OSError("hole")
            return super().__getitem__(index)

    model, samples = wild_llama(), prompted(token_samples(32), torch.arange(20, 60))
    scorer = LossScorer(model, dtype="float32", progress=False)
    sizes = {"dataset_id": "holed", "lengths": [len(s["input_ids"]) for s in samples]}
    losses = scorer.score(Holed(samples), on_error="skip", **sizes).losses
    assert "a prefix of 40 tokens" in scorer.explain()
    wrong = (losses - losses_alone(model, samples)).abs() > 1e-4
    assert not wrong.any()
    assert losses.isnan().nonzero().flatten().tolist() == [unreadable]


def test_common_prefixes():
    samples = prompted(token_samples(4), torch.arange(20, 40))
    assert common_prefix(pad_collate(samples), "causal_lm").tolist() == list(range(20, 40))
    assert len(common_prefix(pad_collate(token_samples(4)), "causal_lm")) == 0
    assert len(common_prefix(pad_collate(samples), "masked_lm")) == 0
    short = {"input_ids": torch.arange(20, 30), "labels": torch.arange(20, 30)}
    assert len(common_prefix(pad_collate([*samples, short]), "causal_lm")) == 0


def test_samples_without_targets_are_packed_too():
    model, samples = wild_llama(), token_samples(6)
    samples[2]["labels"][:] = -100
    losses, _, how = tokens_run(model, samples)
    assert "samples packed" in how
    assert math.isnan(losses[2])
    assert (losses - losses_alone(model, samples)).nan_to_num().abs().max() < 1e-4


def test_a_bit_depends_on_the_pack_alone():
    model, samples = wild_llama(), prompted(token_samples(12), torch.arange(20, 60))
    batch = pad_collate(samples[:4])
    packing = Packing(padded("causal_lm"), torch.arange(20, 60))
    with torch.no_grad():
        packing(model, pad_collate(samples[4:]))
        late = packing(model, batch)[0]
        early = Packing(padded("causal_lm"), torch.arange(20, 60))(model, batch)[0]
        logits = []
        for work in (late, early):
            with work.around():
                logits.append(model(**work.inputs, use_cache=False).logits)
    assert torch.equal(*logits)


def answers(samples, count=4):
    """Several answers to each sample's prompt, in a mixed order."""
    generator = torch.Generator().manual_seed(1)
    several = []
    for sample in samples:
        prompt = int((sample["labels"] == -100).sum())
        for length in torch.randint(1, 20, (count,), generator=generator).tolist():
            answer = torch.randint(2, 199, (length,), generator=generator)
            none = torch.full((prompt,), -100)
            ids = torch.cat([sample["input_ids"][:prompt], answer])
            several.append({"input_ids": ids, "labels": torch.cat([none, answer])})
    return [several[index] for index in torch.randperm(len(several), generator=generator).tolist()]


@pytest.mark.parametrize("template", [0, 12])
@pytest.mark.parametrize("name", ["llama", "mistral", "gemma 2", "gpt-2"])
def test_answers_to_one_prompt_run_it_once(name, template):
    prompts = prompted(token_samples(8, longest=80), torch.arange(20, 20 + template))
    model, samples = zoo.decoder(name), answers(prompts, count=8)
    scorer = LossScorer(model, dtype="float32", max_tokens=300, progress=False)
    with counted_runs(model.get_input_embeddings()) as (_, run):
        losses = scorer.score(samples).losses
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    assert "shared prompts run once (about " in scorer.explain()
    tokens = sum(len(sample["input_ids"]) for sample in samples)
    assert sum(run) < 0.62 * tokens


def test_shared_prompts_in_padded_batches_keep_to_the_budget():
    samples = answers(prompted(token_samples(2), torch.arange(20, 180)), count=30)
    masked = [  # a padded token before each makes the packed ways impossible
        {
            "input_ids": torch.cat([torch.zeros(1).long(), sample["input_ids"]]),
            "labels": torch.cat([torch.full((1,), -100), sample["labels"]]),
            "attention_mask": torch.cat([torch.zeros(1), torch.ones(len(sample["labels"]))]).long(),
        }
        for sample in samples
    ]
    model = tiny_llama().eval()
    sizes = []
    model.register_forward_pre_hook(
        lambda _, __, fields: sizes.append(fields["input_ids"].numel()), with_kwargs=True
    )
    scorer = LossScorer(model, dtype="float32", max_tokens=1024, compile=False, progress=False)
    scorer.score(masked, dataset_id="masked")
    assert "samples padded" in scorer.explain()
    assert max(sizes) <= 1024


def test_shared_prompts_are_told_by_their_tokens():
    assert shared_prompts(token_samples(9)) is None
    assert shared_prompts(["text", "text"]) is None
    samples = answers(token_samples(5), count=3)
    groups, lengths = shared_prompts([*samples, {"input_ids": [4, 5], "labels": [-100, -100]}])
    assert groups.bincount().tolist().count(3) == 5
    assert lengths[-1] == 0
    for index, sample in enumerate(samples):
        assert lengths[index] == (sample["labels"] == -100).sum() - 1
        prompt = sample["input_ids"][: lengths[index]].tolist()
        alike = [s["input_ids"][: lengths[index]].tolist() == prompt for s in samples]
        assert (groups[:-1] == groups[index]).tolist() == alike


# --- what is not packed ------------------------------------------------------------------------


def test_left_padding_is_left_as_it_is():
    samples = token_samples(6)
    batch = pad_collate(
        [{name: value.flip(0) for name, value in sample.items()} for sample in samples]
    )
    batch = {name: value.flip(1) for name, value in batch.items()}
    model = wild_llama()
    (work,) = Packing(padded("causal_lm"))(model, batch)
    assert work.inputs["input_ids"].shape == batch["input_ids"].shape
    scorer = LossScorer(model, dtype="float32", progress=False)

    def left(chosen):
        longest = max(len(sample["input_ids"]) for sample in chosen)
        padding = [longest - len(sample["input_ids"]) for sample in chosen]
        pairs = list(zip(chosen, padding, strict=True))
        fill = {"input_ids": 0, "labels": -100}
        fields = {
            name: torch.stack([nn.functional.pad(s[name], (p, 0), value=v) for s, p in pairs])
            for name, v in fill.items()
        }
        mask = [nn.functional.pad(torch.ones_like(s["labels"]), (p, 0)) for s, p in pairs]
        return fields | {"attention_mask": torch.stack(mask)}

    losses = scorer.score(samples, collate_fn=left).losses
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    assert "samples padded (samples have attention_mask, position_ids)" in scorer.explain()


def test_a_batch_far_larger_than_planned_is_cut():
    model = wild_llama()
    batch = pad_collate(token_samples(30))
    works = Packing(padded("causal_lm", 100), torch.arange(50), max_tokens=100)(model, batch)
    assert len(works) > 5
    assert max(work.inputs["input_ids"].numel() for work in works) <= 100
    assert sum(len(work.counts) for work in works) == 30


def test_reasons_not_to_pack():
    class Remote(type(tiny_llama())):
        pass

    assert why_not_packed(wild_llama(), "causal_lm") == ""
    remote = Remote(tiny_llama().config)
    assert why_not_packed(remote, "causal_lm") == "Remote is not one of transformers' own models"
    assert why_not_packed(zoo.t5(), "seq2seq_lm") == "seq2seq_lm is not causal"
    bloom = why_not_packed(zoo.decoder("bloom"), "causal_lm")
    assert bloom == "BloomForCausalLM has an attention of its own"
    model = tiny_llama()
    model.config.layer_types = ["full_attention", "linear_attention"]
    assert "layers of kind linear_attention" in why_not_packed(model, "causal_lm")


def test_samples_that_see_each_other_are_noticed(monkeypatch, caplog):
    whole = packed.Pass
    monkeypatch.setattr(
        packed,
        "Pass",
        lambda blocks, *rest, **more: whole([Block(1, sum(c * n for c, n, _ in blocks))]),
    )
    model, samples = wild_llama(), token_samples(8)
    losses, _, how = tokens_run(model, samples)
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    assert "packed" not in how
    assert "samples packed: a sample's loss differs by" in caplog.text


def test_layers_with_another_attention_are_noticed(caplog):
    model, samples = wild_llama(), token_samples(8)
    layer = model.model.layers[1].self_attn
    layer.config = type(model.config)(**model.config.to_dict(), attn_implementation="sdpa")
    plain = layer.forward

    def own(*args, **kwargs):
        layer.config._attn_implementation_internal = "sdpa"
        return plain(*args, **kwargs)

    layer.forward = own
    losses, _, how = tokens_run(model, samples)
    assert (losses - losses_alone(model, samples)).abs().max() < 1e-4
    assert "packed" not in how
    assert "1 layers of 2 have attention that can be replaced" in caplog.text


def test_the_configuration_comes_back():
    model = wild_llama()
    before = model.config._attn_implementation
    LossScorer(model, dtype="float32", progress=False).score(token_samples(4))
    assert model.config._attn_implementation == before

    def fails():
        with attention.attending(model, attention.Pass([])):
            assert model.config._attn_implementation == attention.NAME
            raise RuntimeError("boom")

    with pytest.raises(RuntimeError, match="boom"):
        fails()
    assert model.config._attn_implementation == before


def test_attention_other_than_causal_is_refused():
    flat, _ = parts()
    token = attention._running.set(attention.Pass(BLOCKS))
    mask = torch.zeros(1, 1, 1, 1)
    for arguments, options in (((mask,), {}), ((None,), {"is_causal": False})):
        with pytest.raises(ValueError, match="Layer asks for attention other than plain causal"):
            attention._attend(Layer(), *flat, *arguments, **options)
    attention._running.reset(token)
