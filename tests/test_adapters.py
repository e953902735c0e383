"""The base model under adapters: its outputs, and that the model comes back as it went in."""

import pytest
import torch

from flowdata import LossScorer, wise_ft
from flowdata.losses import base_model, causal_lm_loss
from tests.integrations import tiny
from tests.models import tiny_gpt2

peft = pytest.importorskip("peft")

LORA = {"r": 2, "target_modules": ["q_proj", "up_proj"], "init_lora_weights": False}


def lora(**options):
    torch.manual_seed(5)
    return peft.get_peft_model(tiny.make_model(), peft.LoraConfig(**{**LORA, **options}))


def config(kind):
    return {
        "lora": lambda: peft.LoraConfig(**LORA, lora_dropout=0.5),
        "dora": lambda: peft.LoraConfig(**LORA, use_dora=True),
        "head": lambda: peft.LoraConfig(**LORA, modules_to_save=["lm_head"]),
        "tokens": lambda: peft.LoraConfig(**LORA, trainable_token_indices=[3, 4]),
        "lora on the head": lambda: peft.LoraConfig(
            r=2, target_modules=["lm_head"], init_lora_weights=False
        ),
        "ia3": lambda: peft.IA3Config(
            target_modules=["k_proj", "down_proj"],
            feedforward_modules=["down_proj"],
            init_ia3_weights=False,
        ),
        "prompt": lambda: peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
        "prefix": lambda: peft.PrefixTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2),
    }[kind]()


@pytest.mark.parametrize(
    "kind", ["lora", "dora", "head", "tokens", "lora on the head", "ia3", "prompt", "prefix"]
)
def test_the_base_is_the_model_before_its_adapters(kind):
    model = peft.get_peft_model(tiny.make_model(), config(kind)).train()
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.3)
    flags = [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    ids = tiny.collate(tiny.make_samples(3))["input_ids"]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with base_model(model):
        logits = model(input_ids=ids).logits
    expected = tiny.make_model().eval()(ids).logits
    assert not logits.requires_grad
    assert torch.equal(logits, expected)
    assert not torch.allclose(model.eval()(input_ids=ids).logits[:, -ids.shape[1] :], expected)
    model.train()
    assert flags == [(p.requires_grad, m.training) for m in model.modules() for p in m.parameters()]
    assert all(torch.equal(before[name], value) for name, value in model.state_dict().items())


def test_an_adapter_that_was_frozen_stays_so_and_errors_leave_all_as_it_was():
    model = lora()
    frozen = [p for name, p in model.named_parameters() if "lora_A" in name]
    for parameter in frozen:
        parameter.requires_grad_(False)
    with pytest.raises(KeyError), base_model(model):
        raise KeyError
    assert model.training
    assert not any(p.requires_grad for p in frozen)
    assert all(p.requires_grad for name, p in model.named_parameters() if "lora_B" in name)
    assert torch.is_grad_enabled()


def test_a_compiled_model_and_one_in_ddp_are_looked_through(tmp_path):
    ids = torch.arange(1, 9).view(2, 4)
    expected = tiny.make_model().eval()(ids).logits
    compiled = torch.compile(lora(), backend="eager")
    with base_model(compiled):
        assert torch.allclose(compiled(ids).logits, expected, atol=1e-6)
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{tmp_path}/rendezvous", rank=0, world_size=1
    )
    try:
        model = torch.nn.parallel.DistributedDataParallel(lora())
        with base_model(model):
            base = model(ids).logits
        assert torch.equal(base, expected)
        options = {"token_rule": "dft", "kl_to_reference": 0.3, "reference": base}
        causal_lm_loss(model(ids).logits, ids, **options).backward()
        plain = lora()
        causal_lm_loss(plain(ids).logits, ids, **options).backward()
        tiny.assert_same_gradient(tiny.flat_gradient(model), tiny.flat_gradient(plain))
    finally:
        torch.distributed.destroy_process_group()


def test_a_model_without_a_base_that_stays_is_refused_by_name():
    def refuse(model, match):
        with pytest.raises(ValueError, match=match), base_model(model):
            pass

    refuse(tiny.make_model(), "a PEFT model's with its adapters turned off, got LlamaForCausalLM;")
    merged = lora()
    merged.merge_adapter()
    refuse(merged, r"call model.unmerge_adapter\(\) first")
    refuse(lora(init_lora_weights="pissa"), "initialise them with init_lora_weights=True")
    beside = lora()
    beside.base_model.model.model.norm.weight.requires_grad_(True)
    refuse(beside, r"model.norm.weight is trained beside the adapters.*modules_to_save")
    assert beside.base_model.model.model.norm.weight.requires_grad
    options = {"r": 2, "target_modules": ["c_attn"], "fan_in_fan_out": True, "bias": "all"}
    biases = peft.get_peft_model(tiny_gpt2(), peft.LoraConfig(**options))
    refuse(biases, r"bias is trained beside the adapters")


def test_hidden_states_of_the_base_serve_the_fused_loss():
    from flowdata.losses import fused_causal_lm_loss

    batch = tiny.collate(tiny.make_samples(6))
    fields = {key: value for key, value in batch.items() if key != "labels"}
    gradients = []
    for fused in (False, True):
        model = lora()
        rule = {"token_rule": "dft", "kl_to_reference": 0.5}
        if fused:
            backbone, head = model.get_base_model().model, model.get_output_embeddings()
            with base_model(model):
                rule["reference"] = backbone(**fields).last_hidden_state
            hidden = backbone(**fields).last_hidden_state
            loss = fused_causal_lm_loss(hidden, head, batch["labels"], **rule)
        else:
            with base_model(model):
                rule["reference"] = model(**fields).logits
            loss = causal_lm_loss(model(**fields).logits, batch["labels"], **rule)
        loss.backward()
        gradients.append(tiny.flat_gradient(model))
    tiny.assert_same_gradient(*gradients)


def test_dropout_of_the_base_itself_is_off_in_the_block():
    plain = tiny_gpt2()
    ids = torch.arange(1, 9).view(2, 4)
    expected = plain.eval()(input_ids=ids).logits
    config = peft.LoraConfig(r=2, target_modules=["c_attn"], fan_in_fan_out=True)
    model = peft.get_peft_model(plain, config).train()
    for module in model.modules():
        if isinstance(module, torch.nn.Dropout):
            module.p = 0.5
    with base_model(model):
        base = model(input_ids=ids).logits
    assert torch.equal(base, expected)
    assert not torch.allclose(model(input_ids=ids).logits, expected)


def losses_of(model):
    """The loss of each sample alone, by the model's own forward."""
    batches = [tiny.collate([sample]) for sample in tiny.make_samples(4)]
    with torch.no_grad():
        return torch.stack([model.eval()(**batch).loss for batch in batches])


def scorer(model, **options):
    return LossScorer(model, dtype="float32", progress=False, **options)


def moved(model):
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter.add_(0.1)
    return model


@pytest.mark.parametrize("start", [True, False, "gaussian", "orthogonal", "eva", "mica"])
def test_starts_that_leave_the_weights_have_a_base_and_an_average(start):
    expected = losses_of(tiny.make_model())
    models = [moved(lora(init_lora_weights=start)) for _ in range(2)]
    moved(models[1])
    scores = scorer(models[0], reference="base").score(tiny.make_samples(4))
    assert torch.allclose(scores.losses, expected, atol=1e-5)
    with base_model(models[0]):
        assert torch.equal(losses_of(models[0]), expected)
    average = wise_ft(*models, 0.3).merge_and_unload().state_dict()
    first, second = (model.merge_and_unload().state_dict() for model in models)
    for name, value in average.items():
        assert torch.allclose(value, 0.7 * first[name] + 0.3 * second[name], atol=1e-6), name


@pytest.mark.parametrize("is_frozen", [False, True])
@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"bias": "all"}, r"bias='all' .* is trained beside the adapters"),
        ({"bias": "lora_only"}, r"bias='lora_only' .* is trained beside the adapters"),
        ({"layer_replication": [(0, 1), (0, 1)]}, "layer_replication repeats layers"),
        ({"kasa_config": "Kasa"}, "kasa_config cut the smallest singular values"),
        ({"init_lora_weights": "olora"}, "moved a part of the base model's weights into them"),
    ],
)
def test_adapters_that_change_the_base_are_refused_loaded_as_well(options, match, is_frozen):
    if options.get("kasa_config"):
        options = {"kasa_config": peft.KasaConfig()}
    model = moved(lora(**options))
    model.requires_grad_(not is_frozen)
    with pytest.raises(ValueError, match="reference='base' needs .*" + match):
        scorer(model, reference="base")
    with pytest.raises(ValueError, match=match), base_model(model):
        pass


def test_an_embedding_that_is_trained_beside_adapters_is_refused_as_a_base():
    model = lora()
    model.get_base_model().model.embed_tokens.weight.requires_grad_(True)
    flags = [parameter.requires_grad for parameter in model.parameters()]
    match = r"embed_tokens.weight is trained beside the adapters.*reference='model'"
    with pytest.raises(ValueError, match=match):
        scorer(model, reference="base")
    assert flags == [parameter.requires_grad for parameter in model.parameters()]
    model.get_base_model().model.embed_tokens.weight.requires_grad_(False)
    scores = scorer(model, reference="base").score(tiny.make_samples(4))
    assert torch.allclose(scores.losses, losses_of(tiny.make_model()), atol=1e-5)
