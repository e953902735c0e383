"""`flowdata front`, on folders as users have them."""

import json
import sys

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from transformers import AutoModelForCausalLM

from flowdata.drift import DriftMeter, own_text
from tests.models import tiny_llama
from tests.test_cli import data, model_folder, run
from tests.test_cli_drift import one_model_at_a_time
from tests.test_text import tokenizer

__all__ = ["data", "model_folder", "one_model_at_a_time", "tokenizer"]  # fixtures
SMALL = ("--samples", 6, "--length", 12, "--dtype", "float32")


def trained(model, data, tokenizer, steps=12):
    """A model that has learned the data's own rows a little."""
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    texts = [tokenizer(r["question"] + r["answer"])["input_ids"] for r in rows]
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], 3e-3)
    for _ in range(steps):
        for ids in texts[:8]:
            tokens = torch.tensor([ids])
            model(input_ids=tokens, labels=tokens).loss.backward()
        optimizer.step()
        optimizer.zero_grad()
    return model


@pytest.fixture
def tuned_folder(tmp_path, data, tokenizer):
    model = trained(tiny_llama(), data, tokenizer)
    model.save_pretrained(tmp_path / "tuned")
    return tmp_path / "tuned"


def test_the_front_of_two_models_is_measured_drawn_and_written(
    capsys, model_folder, tuned_folder, data, tmp_path, tokenizer
):
    written, picture = tmp_path / "chosen", tmp_path / "new" / "front.png"
    command = ("front", model_folder, tuned_folder, "--valid", data, *SMALL, "--alphas", 0, 0.5, 1)
    command = (*command, "--picture", picture)
    code, out, err = run(capsys, *command, "--json", "--quiet", "--write", written)
    assert code == 0
    assert "front:" not in err
    facts = json.loads(out)
    points = {point["alpha"]: point for point in facts["front"]}
    assert list(points) == [0, 0.5, 1]
    assert points[0]["kl"] == 0 < points[0.5]["kl"] < points[1]["kl"]
    assert points[1]["validation"] < points[0]["validation"]
    costs = {alpha: point["validation"] + point["kl"] for alpha, point in points.items()}
    assert facts["chosen"] == min(costs, key=costs.get)
    assert picture.read_bytes().startswith(b"\x89PNG")

    base = tiny_llama()
    meter = DriftMeter(base, own_text(base, tokenizer, 6, 12), dtype="float32")
    model = AutoModelForCausalLM.from_pretrained(written)
    assert meter(model).kl == pytest.approx(points[facts["chosen"]]["kl"], rel=1e-4, abs=1e-9)

    code, out, err = run(capsys, *command)
    assert code == 0
    assert "front: 4 of 4 models (100%)" in err  # the base and three shares
    assert f"chosen: α = {facts['chosen']:g}" in out
    assert "← chosen" in out
    assert ("--write FOLDER writes" in out) == (facts["chosen"] != 1)  # 1 is there already
    assert ("no average has a smaller sum" in out) == (facts["chosen"] in (0, 1))
    code, out, _ = run(capsys, *command, "--exchange", 1e6)
    assert "that is the model before fine-tuning as it is" in out


def test_one_model_is_in_memory_at_a_time(
    capsys, model_folder, tuned_folder, data, tmp_path, one_model_at_a_time
):
    command = ("front", model_folder, tuned_folder, "--valid", data, *SMALL, "--json")
    code, _, _ = run(capsys, *command, "--alphas", 0, 0.5, 1, "--picture", tmp_path / "front.png")
    assert code == 0
    assert len(one_model_at_a_time) == 4  # the base, and three averages


def test_models_that_differ_in_more_than_their_weights_are_refused(
    capsys, model_folder, tuned_folder, data, tmp_path
):
    config = json.loads((tuned_folder / "config.json").read_text())
    config["rms_norm_eps"] = 1.0
    (tuned_folder / "config.json").write_text(json.dumps(config))
    command = ("front", model_folder, tuned_folder, "--valid", data, *SMALL)
    code, _, err = run(capsys, *command, "--picture", tmp_path / "front.png", "--alphas", 0, 1)
    assert code == 2
    assert f"without its changes to weights {tuned_folder} is not {model_folder}" in err


def test_alpha_scales_what_adapters_add(capsys, model_folder, data, tmp_path, tokenizer):
    config = LoraConfig(target_modules=["q_proj", "v_proj", "down_proj"], lora_alpha=32)
    model = trained(get_peft_model(tiny_llama(), config), data, tokenizer)
    model.save_pretrained(tmp_path / "adapter")
    command = ("front", model_folder, tmp_path / "adapter", "--valid", data, *SMALL)
    command = (*command, "--alphas", 0, 0.5, 1, "--exchange", 0, "--picture", tmp_path / "f.png")
    code, out, _ = run(capsys, *command, "--json", "--write", tmp_path / "scaled")
    assert code == 0
    facts = json.loads(out)
    points = {point["alpha"]: point for point in facts["front"]}
    assert points[0]["kl"] == 0 < points[0.5]["kl"] < points[1]["kl"]
    base = tiny_llama()
    meter = DriftMeter(base, own_text(base, tokenizer, 6, 12), dtype="float32")
    scaled = PeftModel.from_pretrained(tiny_llama(), tmp_path / "scaled")
    assert meter(scaled).kl == pytest.approx(points[facts["chosen"]]["kl"], rel=1e-4)


@pytest.mark.parametrize(
    ("options", "reason"),
    [
        ({"modules_to_save": ["lm_head"]}, "modules_to_save"),
        ({"trainable_token_indices": [3, 4]}, "trainable_token_indices"),
        ({"bias": "all"}, "bias"),
        ({"init_lora_weights": "pissa"}, "init_lora_weights='pissa'"),
    ],
    ids=str,
)
def test_adapters_that_do_not_scale_are_refused(
    options, reason, capsys, model_folder, data, tmp_path
):
    config = LoraConfig(target_modules=["q_proj"], **options)
    get_peft_model(tiny_llama(), config).save_pretrained(tmp_path / "adapter")
    code, _, err = run(capsys, "front", model_folder, tmp_path / "adapter", "--valid", data)
    assert code == 2
    assert f"{reason}, which do not scale; merge them" in err


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (("--alphas", 0, 1.5), "--alphas must lie between 0 and 1, got 1.5"),
        (("--alphas", "nan"), "--alphas must lie between 0 and 1, got nan"),
        (("--alphas", 0.5, 0.5), "--alphas must be several numbers, got 0.5 twice"),
        (("--exchange", -1), "--exchange must be finite and >= 0, got -1.0"),
        (("--picture", "."), "--picture must name a file, and . is a folder"),
    ],
    ids=str,
)
def test_numbers_that_are_wrong_are_refused_before_anything_is_run(options, message, capsys, data):
    code, _, err = run(capsys, "front", "no-base", "no-tuned", "--valid", data, *options)
    assert code == 2
    assert message in err


def test_a_missing_matplotlib_is_told_before_anything_is_run(capsys, data, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    code, _, err = run(capsys, "front", "no-base", "no-tuned", "--valid", data)
    assert code == 2
    assert "pictures need matplotlib: " in err


def test_what_was_written_is_what_was_measured(capsys, tmp_path, data, tokenizer):
    tied = tiny_llama(tie_word_embeddings=True)
    base, tuned, written = (tmp_path / name for name in ("base", "tuned", "written"))
    tied.save_pretrained(base, max_shard_size="20KB")
    tokenizer.save_pretrained(base)
    trained(tied, data, tokenizer).bfloat16().save_pretrained(tuned)
    command = ("--valid", data, *SMALL, "--json", "--picture", tmp_path / "f.png")
    alpha = 0.123456789  # more digits than are printed
    code, out, _ = run(
        capsys, "front", base, tuned, *command, "--alphas", alpha, "--write", written
    )
    assert code == 0
    assert len(list(base.glob("*.safetensors"))) > 1
    facts = json.loads(out)
    assert facts["chosen"] == alpha
    code, out, _ = run(capsys, "front", base, written, *command, "--alphas", 1)
    assert code == 0
    (point,), (again,) = facts["front"], json.loads(out)["front"]
    assert point | {"alpha": 1} == again


def test_a_folder_that_is_there_is_not_written_over(capsys, model_folder, data, tmp_path):
    command = ("front", model_folder, model_folder, "--valid", data, "--write", tmp_path)
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "--write must name a new folder" in err


@pytest.mark.parametrize("flag", ["--write", "--picture"])
def test_a_place_below_a_file_is_refused_before_anything_is_read(flag, capsys, data):
    code, _, err = run(
        capsys, "front", "no-base", "no-tuned", "--valid", data, flag, data / "new" / "place"
    )
    assert code == 2
    assert f"{flag} must lie in a folder, and {data} is a file" in err


def test_a_gguf_file_is_refused_before_anything_is_read(capsys, tuned_folder, data, tmp_path):
    gguf = tmp_path / "model.gguf"
    gguf.write_bytes(b"GGUF")
    code, _, err = run(capsys, "front", gguf, tuned_folder, "--valid", data, *SMALL)
    assert code == 2
    assert "model.gguf is a GGUF file: write a folder of it first" in err
    assert "load_tokenizer(FILE).save_pretrained(FOLDER)" in err
