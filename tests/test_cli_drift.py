"""`flowdata drift`, on folders as users have them."""

import gc
import json
import os
import subprocess
import sys
import weakref

import pytest
import torch
import transformers
from peft import LoraConfig, get_peft_model

from flowdata.drift import DriftMeter, own_text
from flowdata.text.models import check_model
from tests.models import tiny_llama
from tests.test_cli import data, model_folder, run
from tests.test_drift import moved
from tests.test_text import tokenizer

__all__ = ["data", "model_folder", "tokenizer"]  # fixtures


@pytest.fixture(scope="module")
def tuned_folders(tmp_path_factory):
    folder = tmp_path_factory.mktemp("tuned")
    moved(tiny_llama()).save_pretrained(folder / "whole")
    config = LoraConfig(target_modules=["q_proj"], init_lora_weights=False, lora_alpha=64)
    get_peft_model(tiny_llama(), config).save_pretrained(folder / "adapter")
    return [str(folder / "whole"), str(folder / "adapter")]


@pytest.fixture
def one_model_at_a_time(monkeypatch):
    """Every model that is loaded is gone when the next one is; gives how many were loaded."""
    load, models, loads = transformers.AutoModelForCausalLM.from_pretrained, weakref.WeakSet(), []

    def load_alone(*args, **kwargs):
        gc.collect()
        assert len(models) == 0, "another model is still in memory"
        loads.append(args)
        model, found = load(*args, **kwargs)
        models.add(model)
        return model, found

    monkeypatch.setattr(transformers.AutoModelForCausalLM, "from_pretrained", load_alone)
    return loads


def test_one_model_is_in_memory_at_a_time(
    capsys, model_folder, tuned_folders, tmp_path, one_model_at_a_time
):
    config = LoraConfig(target_modules=["q_proj"], modules_to_save=["lm_head"])
    saved = get_peft_model(tiny_llama(), config)
    with torch.no_grad():
        saved.get_submodule("base_model.model.lm_head.modules_to_save.default").weight.mul_(2)
    saved.save_pretrained(tmp_path / "saved")
    sources = (*tuned_folders, str(tmp_path / "saved"), *tuned_folders[1:], model_folder)
    command = ("drift", model_folder, "--samples", 4, "--length", 8, "--dtype", "float32", "--json")
    code, out, _ = run(capsys, *command, *sources)
    assert code == 0
    assert len(one_model_at_a_time) == 1 + len(sources)
    facts = json.loads(out)["drift"]
    assert facts[model_folder]["kl"] == 0  # adapters before it left nothing in the base
    assert facts[sources[2]]["kl"] > 0


def test_models_and_adapters_are_compared_on_what_the_base_writes(
    capsys, model_folder, tuned_folders, tokenizer
):
    command = ("drift", model_folder, *tuned_folders, "--samples", 6, "--length", 12)
    command = (*command, "--dtype", "float32")
    code, out, _ = run(capsys, *command)
    assert code == 0
    assert f"drift from {model_folder} on 6 texts that the base wrote itself" in out
    assert "the loss has risen" in out
    code, out, _ = run(capsys, *command, "--json")
    facts = json.loads(out)["drift"]
    base = tiny_llama()
    meter = DriftMeter(base, own_text(base, tokenizer, 6, 12), dtype="float32")
    assert facts[tuned_folders[0]]["kl"] == pytest.approx(meter(moved(base)).kl)
    assert facts[tuned_folders[1]]["kl"] > 0


def test_a_file_can_be_the_probe(capsys, model_folder, tuned_folders, data):
    code, out, _ = run(
        capsys, "drift", model_folder, model_folder, tuned_folders[0], "--probe", data, "--json"
    )
    assert code == 0
    facts = json.loads(out)["drift"]
    assert facts[model_folder]["kl"] == 0
    assert facts[tuned_folders[0]]["kl"] > 0
    assert facts[tuned_folders[0]]["samples"] == 30


@pytest.mark.parametrize(
    ("options", "flag"),
    [
        (("--limit", 3), "--limit"),
        (("--no-template",), "--no-template"),
        (("--prompt-column", "q"), "--prompt-column"),
        (("--template-option", "thinking=false"), "--template-option"),
        (("--on-error", "skip", "--tokenizer", "t"), "--on-error"),
    ],
    ids=str,
)
def test_options_of_text_are_refused_where_none_is_read(options, flag, capsys):
    code, _, err = run(capsys, "drift", "no-base", "no-tuned", *options)
    assert code == 2
    assert f"{flag} has no effect: the base model writes the text itself" in err


@pytest.mark.parametrize("flag", ["--samples", "--length", "--seed"])
@pytest.mark.parametrize("command", ["drift", "front"])
def test_options_of_own_text_are_refused_where_a_file_is_read(
    command, flag, capsys, model_folder, data
):
    valid = ("--valid", data) if command == "front" else ()
    given = (command, model_folder, model_folder, *valid, "--probe", data, flag, 8)
    code, _, err = run(capsys, *given)
    assert code == 2
    assert f"{flag} has no effect on --probe {data}" in err
    assert "--limit takes the first rows of a file" in err


def test_what_is_no_model_is_one_line(capsys, model_folder, tmp_path):
    code, _, err = run(capsys, "drift", model_folder, tmp_path, "--samples", 2, "--length", 4)
    assert code == 2
    assert "holds neither a config.json nor a GGUF file" in err


@pytest.mark.parametrize("command", ["score", "drift", "front"])
def test_a_device_that_is_not_there_is_told_before_anything_is_read(command, capsys, data):
    words = {
        "score": (data, "--store", "no-store"),
        "drift": ("b",),
        "front": ("b", "--valid", data),
    }
    code, _, err = run(capsys, command, "a", *words[command], "--device", "abacus")
    assert code == 2
    assert err.startswith(f"flowdata {command}: --device abacus can't be used here: ")


@pytest.mark.parametrize("name", ["nosuch", "./nosuch", "tuned/nosuch", "tunde/final", "a/b.gguf"])
@pytest.mark.parametrize("command", ["score", "drift", "front"])
def test_local_names_of_models_are_not_sent_to_the_hub(
    command, name, capsys, model_folder, tmp_path, monkeypatch
):
    (tmp_path / "tuned" / "final").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    for loader in (transformers.AutoTokenizer, transformers.AutoModelForCausalLM):
        monkeypatch.setattr(loader, "from_pretrained", lambda *a, **k: pytest.fail("asked the hub"))
    commands = {
        "score": (name, "no.jsonl"),
        "drift": (model_folder, model_folder, name),
        "front": (model_folder, name, "--valid", "no.jsonl"),
    }
    code, _, err = run(capsys, command, *commands[command])
    assert code == 2
    assert f"there is no file or folder {name}" in err
    hints = {"nosuch": "hub models are named owner/name", "tunde/final": "there is tuned/final"}
    assert hints.get(name, "") in err


@pytest.mark.parametrize(
    ("variable", "value", "reason"),
    [
        ("HF_ENDPOINT", "http://localhost:1", "http://localhost:1, can't be reached (["),
        ("HF_HUB_OFFLINE", "1", "the hub is not asked, since HF_HUB_OFFLINE is set: unset it"),
    ],
)
def test_a_hub_that_cannot_be_reached_is_told_in_one_line(
    variable, value, reason, model_folder, tmp_path
):
    settings = {"HF_HUB_OFFLINE": "0", "HF_HOME": str(tmp_path), variable: value}
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "a", "completion": "b"}\n')
    for command in (
        ("score", "owner/name", data, "--store", tmp_path / "s"),
        ("score", model_folder, data, "--store", tmp_path / "s", "--tokenizer", "owner/name"),
        ("drift", model_folder, "owner/name"),
    ):
        done = subprocess.run(
            [sys.executable, "-m", "flowdata", *map(str, command)],
            capture_output=True,
            text=True,
            env={**os.environ, **settings},
        )
        assert done.returncode == 2
        (line,) = done.stderr.splitlines()
        assert ": owner/name is not on this machine, and the hub" in line
        assert reason in line
        assert line.endswith("; or name a folder or GGUF file here")


def test_models_of_the_hub_that_are_here_go_by_their_names(tmp_path, monkeypatch):
    known = {"gpt2": str(tmp_path), "owner/name": str(tmp_path)}
    monkeypatch.setattr(
        "huggingface_hub.try_to_load_from_cache", lambda name, file: known.get(name)
    )
    check_model("gpt2")
    check_model("owner/name")
    with pytest.raises(FileNotFoundError, match="there is no file or folder gpt3"):
        check_model("gpt3")
