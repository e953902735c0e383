"""What only a GPU can show: its kernels, its memory, and that the host never waits for it.

On a machine with one: python -m pytest tests/test_gpu.py, or the first part of
`python -m benchmarks gpu`.
"""

import contextlib
import copy

import pytest
import torch
import torch.nn.functional as F
from torch import nn

import flowdata
from flowdata import LossScorer
from flowdata.losses import causal_lm_loss, fused_causal_lm_loss
from flowdata.models.tensors import to_device
from flowdata.scoring.language.attention import Pass
from flowdata.scoring.language.blocks import AttentionOptions, Block, attend_by_block
from flowdata.scoring.language.varlen import has_varlen, varlen
from flowdata.targets.target_losses import Fetched, TargetLosses
from tests import reference, zoo
from tests.models import TinyResNet, images, tiny_llama, token_samples

if not torch.cuda.is_available():
    pytest.skip("no GPU", allow_module_level=True)
GPU = torch.device("cuda:0")


@contextlib.contextmanager
def no_waiting():
    """Raise where the host waits for the GPU."""
    torch.cuda.synchronize()
    torch.cuda.set_sync_debug_mode("error")
    try:
        yield
    finally:
        torch.cuda.set_sync_debug_mode("default")


def memory_of(run):
    """Bytes that a call adds at its highest."""
    torch.cuda.synchronize()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    return torch.cuda.max_memory_allocated() - held


def alone(model, samples):
    """One sample at a time through the model's own forward, on the GPU."""
    losses = []
    for sample in samples:
        ids, labels = sample["input_ids"].to(GPU), sample["labels"].to(GPU)
        with torch.no_grad():
            logits = model(input_ids=ids[None], use_cache=False).logits[0, :-1].float()
        losses.append(F.cross_entropy(logits, labels[1:]))
    return torch.stack(losses).cpu()


@pytest.mark.parametrize("window", [None, 24])
@pytest.mark.parametrize("prefix", [0, 7])
@pytest.mark.parametrize(
    ("heads", "key_heads", "width"), [(8, 8, 64), (8, 2, 128), (4, 1, 256), (6, 2, 24)]
)
def test_varlen_attention_is_that_of_blocks(heads, key_heads, width, prefix, window):
    torch.manual_seed(0)
    blocks = [Block(1, 40), Block(3, 33), Block(1, 50), Block(2, 9, after=2), Block(1, 1)]
    tokens = sum(block.samples * block.length for block in blocks)
    q = torch.randn(1, heads, tokens, width, device=GPU, dtype=torch.bfloat16)
    k, v = torch.randn(2, 1, key_heads, tokens, width, device=GPU, dtype=torch.bfloat16)
    before = None
    if prefix:
        before = tuple(torch.randn(2, 1, key_heads, prefix, width, device=GPU).bfloat16())
    assert has_varlen(q)
    options = AttentionOptions(0.3 * width**-0.5, window, None, None)
    exact, rounded = (
        attend_by_block(
            blocks,
            *(each.to(dtype) for each in (q, k, v)),
            None if before is None else tuple(each.to(dtype) for each in before),
            options,
            Pass([]).masks,
        )[0].float()
        for dtype in (torch.float32, torch.bfloat16)
    )
    actual = varlen(blocks, q, k, v, before, options.scaling, window).float()
    assert (actual - exact).abs().max() <= 2 * (rounded - exact).abs().max() + 1e-3


@pytest.mark.parametrize("template", [False, True], ids=["", "template"])
@pytest.mark.parametrize("name", zoo.DECODERS)
def test_every_family_scores_as_one_sample_at_a_time(name, template):
    try:
        model = zoo.decoder(name).to(GPU)
    except (ImportError, ValueError) as error:  # a family that this transformers lacks
        pytest.skip(str(error))
    samples = token_samples(30)
    if template:
        shared = torch.arange(20, 32)
        samples = [
            {
                "input_ids": torch.cat([shared, sample["input_ids"]]),
                "labels": torch.cat([torch.full_like(shared, -100), sample["labels"]]),
            }
            for sample in samples
        ]
    exact = alone(model, samples)
    in_bfloat16 = copy.deepcopy(model).bfloat16()
    plain_errors = (alone(in_bfloat16, samples) - exact).abs()
    for dtype, allowed in (("float32", 1e-4), ("bfloat16", 2 * plain_errors.max() + 1e-3)):
        scorer = LossScorer(model, "causal_lm", dtype=dtype, max_tokens=200, progress=False)
        losses = scorer.score(samples, dataset_id="zoo").losses
        error = (losses - exact).abs().max()
        print(f"{name} {dtype}: off by {error:.1e}, allowed {allowed:.1e}; {scorer.explain()}")
        assert error <= allowed
        assert ("samples packed" in scorer.explain()) == (name in zoo.PACKED)


def test_a_llama_takes_the_fastest_way_without_warning(caplog):
    pytest.importorskip("triton")
    model = tiny_llama(hidden_size=128, num_attention_heads=2, num_key_value_heads=1).to(GPU)
    scorer = LossScorer(model, progress=False)
    scorer.score(token_samples(40), dataset_id="x")
    assert "causal_lm in bfloat16 on cuda:0" in scorer.explain()
    assert "through a Triton head, samples packed" in scorer.explain()
    assert not [each for each in caplog.messages if "no better than a guess" not in each]


@pytest.mark.parametrize("columns", [(), ("entropy", "correct", "gradient_norm")])
def test_the_host_never_waits_within_a_pack(columns, monkeypatch):
    from flowdata.scoring import run

    model = tiny_llama(hidden_size=128, num_attention_heads=2).to(GPU)
    scorer = LossScorer(model, dtype="bfloat16", columns=columns, max_tokens=256, progress=False)
    samples = token_samples(40)
    expected = scorer.score(samples, dataset_id="x")
    agreed_way = run.agreed_way

    def watched(*args):
        way, description = agreed_way(*args)

        def without_waiting(model, batch):
            with no_waiting():
                return way(model, batch)

        return without_waiting, description

    class Watched(Fetched):
        def __init__(self, losses):
            with no_waiting():
                super().__init__(losses)

    monkeypatch.setattr(run, "agreed_way", watched)
    monkeypatch.setattr(run, "Fetched", Watched)
    scores = scorer.score(samples, dataset_id="x")
    assert torch.equal(scores.losses, expected.losses)


def test_losses_are_fetched_without_waiting():
    values = torch.rand(1000, device=GPU)
    with no_waiting():
        fetched = Fetched(TargetLosses(values, torch.ones(1000).long(), {"entropy": values}))
        (moved,) = to_device([torch.ones(5)], GPU)
    assert moved.is_cuda
    columns = fetched.columns(token_losses=True)
    assert torch.equal(columns["token_loss"], values.cpu())
    assert torch.equal(columns["entropy"], values.cpu())


def test_scoring_holds_no_logits():
    model = tiny_llama(vocab_size=131072, hidden_size=128, num_attention_heads=2).to(GPU).bfloat16()
    samples = token_samples(400, longest=200)
    targets = sum(int((sample["labels"] != -100).sum()) for sample in samples)
    scorer = LossScorer(model, dtype="bfloat16", progress=False)
    scorer.score(samples[:40], dataset_id="few")  # compiles
    memory = memory_of(lambda: scorer.score(samples, dataset_id="x"))
    assert memory < targets * 131072 * 2 / 10


def test_a_killed_run_goes_on_with_the_same_bits(tmp_path):
    model, samples = tiny_llama().to(GPU), token_samples(60)
    scorer = LossScorer(model, dtype="bfloat16", max_tokens=200, progress=False)
    expected = scorer.score(samples, dataset_id="x").losses

    class Broken(list):
        def __getitem__(self, index):
            if index == 31 and self.is_broken:
                raise OSError("unplugged")
            return super().__getitem__(index)

    broken = Broken(samples)
    broken.is_broken = False
    lengths = [len(sample["input_ids"]) for sample in samples]
    store, options = tmp_path / "scores", {"dataset_id": "x", "lengths": lengths}
    broken.is_broken = True
    with pytest.raises(Exception, match="unplugged"):
        scorer.score(broken, store=store, **options)
    broken.is_broken = False
    losses = scorer.score(broken, store=store, **options).losses
    assert torch.equal(losses, scorer.score(samples, **options).losses)
    assert (losses - expected).abs().max() < 0.05


def test_a_model_on_the_host_is_scored_on_the_gpu_and_stays():
    model, samples = tiny_llama(), token_samples(20)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    here = LossScorer(model, dtype="float32", progress=False).score(samples).losses
    there = LossScorer(model, dtype="float32", device="cuda", progress=False).score(samples).losses
    assert (here - there).abs().max() < 1e-4
    assert not torch.equal(here, there)  # it did run elsewhere
    for name, value in model.state_dict().items():
        assert value.device.type == "cpu"
        assert torch.equal(value, before[name])


def test_a_store_made_on_the_host_is_not_read_as_one_of_the_gpu(tmp_path):
    model, samples = tiny_llama(), token_samples(20)
    store = tmp_path / "scores"
    LossScorer(model, dtype="float32", progress=False).score(samples, store=store)
    again = LossScorer(model.to(GPU), dtype="float32", progress=False)
    assert torch.equal(
        again.score(samples, store=store).losses, flowdata.Scores.load(store).losses
    )  # the same identity: content, not place


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_images(dtype):
    model, data = TinyResNet().to(GPU).eval(), images(40)
    with torch.no_grad():
        expected = torch.stack(
            [F.cross_entropy(model(x[None].to(GPU)), y[None].to(GPU)) for x, y in data]
        ).cpu()
        low = copy.deepcopy(model).bfloat16()
        rounded = torch.stack(
            [
                F.cross_entropy(low(x[None].to(GPU).bfloat16()).float(), y[None].to(GPU))
                for x, y in data
            ]
        ).cpu()
    allowed = 1e-5 if dtype == "float32" else 2 * (rounded - expected).abs().max() + 1e-3
    losses = LossScorer(model, dtype=dtype, progress=False).score(data).losses
    assert (losses - expected).abs().max() <= allowed


def test_a_loss_never_waits_for_weights_of_the_host():
    logits = torch.randn(4, 9, 50, device=GPU, requires_grad=True)
    labels, weights = torch.randint(50, (4, 9), device=GPU), torch.rand(4)
    losses = torch.rand(4, device=GPU, requires_grad=True)
    with no_waiting():
        causal_lm_loss(logits, labels, weights).backward()
        causal_lm_loss(logits, labels, weights, num_items=32.0).backward()
        flowdata.weighted_mean(losses, weights).backward()
    expected = flowdata.weighted_mean(losses.cpu(), weights)
    torch.testing.assert_close(flowdata.weighted_mean(losses, weights).cpu(), expected)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("softcap", "scale"), [(None, 1.0), (5.0, 0.5)])
@pytest.mark.parametrize("rule", [None, "eaft", "asft"])
def test_the_fused_loss_and_its_gradients(dtype, softcap, scale, rule):
    torch.manual_seed(0)
    base = nn.Linear(64, 3000, bias=True, device=GPU, dtype=dtype)
    base_states = torch.randn(4, 33, 64, device=GPU, dtype=dtype)
    options = {"token_rule": "dft", "kl_to_reference": 0.5} if rule == "asft" else {}
    options = {"token_rule": "eaft"} if rule == "eaft" else options
    head = nn.Linear(64, 3000, bias=True, device=GPU, dtype=dtype)
    hidden = torch.randn(4, 33, 64, device=GPU, dtype=dtype)
    labels = torch.randint(3000, (4, 33), device=GPU)
    labels[:, :9] = -100
    weights = torch.rand(4, device=GPU)

    def gradients(kind):
        module, states = copy.deepcopy(head).to(kind), hidden.to(kind, copy=True).requires_grad_()
        logits = reference.head_logits(states, module, softcap, scale)
        held = {}
        if rule == "asft":
            layer = copy.deepcopy(base).to(kind)
            held["reference"] = reference.head_logits(base_states.to(kind), layer, softcap, scale)
        loss = causal_lm_loss(logits, labels, weights, **options, **held)
        loss.backward()
        return [loss, states.grad, module.weight.grad, module.bias.grad]

    exact, plain = gradients(torch.float64), gradients(dtype)
    states = hidden.clone().requires_grad_()
    module = copy.deepcopy(head)
    held = {"reference": (base_states, base)} if rule == "asft" else {}
    options |= {"softcap": softcap, "logit_scale": scale}
    loss = fused_causal_lm_loss(states, module, labels, weights, **options, **held)
    loss.backward()
    fused = [loss, states.grad, module.weight.grad, module.bias.grad]
    for true, usual, ours in zip(exact, plain, fused, strict=True):
        own_error = (usual.double() - true).norm() / true.norm()
        error = (ours.double() - true).norm() / true.norm()
        assert error <= 2 * own_error + 1e-5


def test_the_fused_loss_holds_no_logits():
    head = nn.Linear(256, 128256, bias=False, device=GPU, dtype=torch.bfloat16)
    hidden = torch.randn(8, 1024, 256, device=GPU, dtype=torch.bfloat16, requires_grad=True)
    labels = torch.randint(128256, (8, 1024), device=GPU)
    memory = memory_of(lambda: fused_causal_lm_loss(hidden, head, labels).backward())
    assert memory < 8 * 1024 * 128256 * 4 / 5  # of float32 logits


def test_weights_and_samplers_take_losses_of_the_gpu():
    losses = torch.rand(1000, device=GPU) + 0.1
    weights = flowdata.flow_weights(losses)
    assert torch.allclose(weights.cpu(), flowdata.flow_weights(losses.cpu()))
    assert flowdata.resolve_temperature(losses, "median") == pytest.approx(
        reference.median(losses.cpu())
    )
    here, there = (list(flowdata.FlowSampler(each, seed=0)) for each in (weights.cpu(), weights))
    assert here == there
    data = flowdata.FlowWeightedDataset(list(range(1000)), weights)
    assert data[3][1].device.type == "cpu"


def test_the_companions():
    model = TinyResNet().to(GPU)
    anchor = flowdata.ParameterAnchor(model, strength=0.5)
    started = copy.deepcopy(model.state_dict())
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.add_(torch.randn_like(parameter))
    expected = sum(
        (value - started[name]).square().sum() for name, value in model.named_parameters()
    )
    torch.testing.assert_close(anchor(), 0.5 * expected)
    before = TinyResNet().to(GPU)
    before.load_state_dict(started)
    middle = flowdata.wise_ft(before, model, 0.5)
    for name, value in middle.items() if isinstance(middle, dict) else middle.state_dict().items():
        if value.is_floating_point():
            torch.testing.assert_close(value, (started[name] + model.state_dict()[name]) / 2)


def test_a_linear_probe():
    data = images(120)
    heads = []
    for device in ("cpu", GPU):
        body, head = TinyResNet().eval().to(device), nn.Linear(16, 5).to(device)
        body.head = nn.Identity()
        options = {"dtype": "float32", "strength": 1e-2, "progress": False}
        # A GPU's convolutions round float32 inputs to 10 bits unless they are told not to.
        with torch.backends.cudnn.flags(allow_tf32=False):
            heads.append(flowdata.linear_probe(body, head, data, **options))
    for here, there in zip(heads[0].parameters(), heads[1].parameters(), strict=True):
        assert there.device == GPU
        torch.testing.assert_close(here, there.cpu(), rtol=1e-2, atol=1e-3)


def test_trainer_takes_the_weighted_step(tmp_path):
    pytest.importorskip("accelerate")
    from transformers import TrainingArguments

    from flowdata.integrations.transformers import FlowTrainer
    from flowdata.scoring.collate import pad_collate

    samples, weights = token_samples(16), torch.rand(16)
    model = tiny_llama()
    expected = copy.deepcopy(model).to(GPU)
    arguments = TrainingArguments(
        output_dir=str(tmp_path),
        per_device_train_batch_size=16,
        max_steps=1,
        learning_rate=0.1,
        optim="sgd",
        lr_scheduler_type="constant",
        max_grad_norm=0.0,
        report_to=[],
        save_strategy="no",
        disable_tqdm=True,
    )
    try:
        trainer = FlowTrainer(
            model, arguments, train_dataset=samples, scores=weights, data_collator=pad_collate
        )
    except ImportError as error:  # the adapter refuses this release
        pytest.skip(str(error))
    trainer.train()
    batch = {name: value.to(GPU) for name, value in pad_collate(samples).items()}
    labels = batch.pop("labels")
    logits = expected(**batch).logits
    loss = causal_lm_loss(logits, labels, weights.to(GPU))
    loss.backward()
    for name, parameter in expected.named_parameters():
        target = parameter - 0.1 * parameter.grad
        torch.testing.assert_close(
            dict(model.named_parameters())[name], target, rtol=1e-3, atol=1e-5
        )


def test_compiled_layers_give_the_same_losses():
    model, samples = tiny_llama(hidden_size=128, num_attention_heads=2).to(GPU), token_samples(40)
    options = {"dtype": "bfloat16", "max_tokens": 256, "progress": False}
    plain = LossScorer(model, compile=False, **options).score(samples, dataset_id="x").losses
    scorer = LossScorer(model, compile=True, **options)
    losses = scorer.score(samples, dataset_id="x").losses
    assert "layers compiled" in scorer.explain()
    assert (losses - plain).abs().max() < 0.05
