"""Checkpoints that lack weights, or hold another model's, are refused before anything is scored."""

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model
from safetensors.torch import load_file, save_file

from flowdata.text import load_model
from flowdata.text.models import load_tuned_model
from tests.models import tiny_llama
from tests.test_cli import data, run
from tests.test_text import tokenizer

__all__ = ["data", "tokenizer"]  # the fixtures

ATTENTION = "model.layers.0.self_attn.q_proj.weight"


@pytest.fixture
def folder(tmp_path):
    tiny_llama().save_pretrained(tmp_path / "model")
    return tmp_path / "model"


def changed(folder, change, file="model.safetensors"):
    """The folder, with other tensors in its file."""
    tensors = load_file(folder / file)
    save_file(change(tensors), folder / file, metadata={"format": "pt"})
    return str(folder)


def without(tensors, *parts):
    return {name: each for name, each in tensors.items() if not any(p in name for p in parts)}


def renamed(tensors, old, new):
    return {name.replace(old, new): each for name, each in tensors.items()}


LACKING = {
    "one weight": (lambda t: without(t, ATTENTION), rf"lacks {ATTENTION} of the model"),
    "the head": (lambda t: without(t, "lm_head"), "lacks lm_head.weight of the model"),
    "another kind": (
        lambda t: renamed(t, "lm_head", "score"),
        "lacks lm_head.weight .* and has score.weight that the model doesn't know: they were drawn",
    ),
    "a wrapper": (
        lambda t: renamed(t, "model.", "transformer."),
        r"lacks model.embed_tokens.weight, .* and 17 more of the model",
    ),
}


@pytest.mark.parametrize("kind", LACKING)
def test_a_model_that_lacks_weights_is_refused(folder, kind):
    change, reason = LACKING[kind]
    assert load_model(str(folder))
    with pytest.raises(ValueError, match=reason):
        load_model(changed(folder, change))


def test_the_command_says_so_in_a_line(folder, tmp_path, data, tokenizer, capsys):
    changed(folder, lambda t: without(t, ATTENTION))
    tokenizer.save_pretrained(folder)
    code, _, err = run(capsys, "score", folder, data, "--store", tmp_path / "scores", "--quiet")
    assert code == 2
    assert f"lacks {ATTENTION} of the model that its config describes" in err.splitlines()[-1]
    assert not (tmp_path / "scores").exists()


def test_weights_without_a_place_are_warned_of(folder, caplog):
    more = {"model.layers.7.mlp.up_proj.weight": torch.ones(2, 2)}
    assert load_model(changed(folder, lambda t: t | more))
    assert "has model.layers.7.mlp.up_proj.weight that the model which its config" in caplog.text


def test_damaged_weights_and_those_of_other_shapes_are_named(folder):
    file = folder / "model.safetensors"
    whole = file.read_bytes()
    file.write_bytes(whole[: len(whole) // 2])
    with pytest.raises(ValueError, match=r"weights of .* can't be read .* was cut; get it again"):
        load_model(str(folder))
    file.write_bytes(whole)
    config = transformers.AutoConfig.from_pretrained(folder)
    config.vocab_size += 1
    config.save_pretrained(folder)
    with pytest.raises(ValueError, match=r"weights of .* have other shapes than its config"):
        load_model(str(folder))


@pytest.fixture
def adapters(folder, tmp_path):
    config = LoraConfig(target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    model = get_peft_model(load_model(str(folder)), config)
    model.save_pretrained(tmp_path / "adapters")
    return tmp_path / "adapters"


@pytest.mark.parametrize("load", ["on its base", "alone"])
@pytest.mark.parametrize(
    ("change", "reason"),
    [
        (lambda t: without(t, "v_proj"), r"lacks .*v_proj.lora_A.* and 1 more of the"),
        (lambda t: renamed(t, ".layers.", ".blocks."), r"lacks .* and 5 more of the .*\.blocks\."),
    ],
    ids=["lacking", "renamed"],
)
def test_adapters_that_are_not_the_models_are_refused(adapters, folder, load, change, reason):
    def loaded():
        if load == "alone":
            return load_model(str(adapters))
        return load_tuned_model(str(folder), str(adapters))

    assert loaded()
    changed(adapters, change, "adapter_model.safetensors")
    with pytest.raises(ValueError, match=reason):
        loaded()


def test_adapters_whose_base_is_gone_name_it(adapters, folder):
    folder.rename(folder.with_name("moved"))
    with pytest.raises(FileNotFoundError, match=r"adapters holds adapters on .*model: there is no"):
        load_model(str(adapters))


def test_adapters_whose_configuration_is_damaged_are_named(adapters):
    (adapters / "adapter_config.json").write_text("{broken")
    with pytest.raises(ValueError, match=r"adapter_config.json of .*adapters can't be read .* get"):
        load_model(str(adapters))
