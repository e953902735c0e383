"""The sweep over architectures: a sample of it, and that it would see what it looks for."""

import copy
import dataclasses
import json
import math
import os
import signal
import time

import pytest
import torch

from benchmarks import rows as benchmark_rows
from benchmarks import sweep
from benchmarks.sweep.architectures import KINDS, architectures, configuration_class
from benchmarks.sweep.building import candidates, special_tokens
from benchmarks.sweep.processes import rows_of
from benchmarks.sweep.row import case_of, make_case, make_row, score
from benchmarks.sweep.samples import LENGTHS, Words
from benchmarks.sweep.shrinking import HEADS, LAYERS, VOCABULARY, WIDTH, shortened, shrunk
from benchmarks.sweep.table import status, table
from benchmarks.sweep.truth import true_losses
from benchmarks.sweep.verdicts import MARGIN, RIGHT, WRONG, how, judge

# A spread of the kinds: packed and padded decoders, unshifted losses of a model's own, padding
# that leaks, sounds, images with texts.
SAMPLE = [
    ("causal_lm", "llama"),
    ("causal_lm", "bart"),
    ("causal_lm", "bert"),
    ("masked_lm", "bert"),
    ("masked_lm", "flaubert"),
    ("sequence_classification", "convbert"),
    ("sequence_classification", "gpt2"),
    ("token_classification", "distilbert"),
    ("seq2seq_lm", "t5"),
    ("image_classification", "resnet"),
    ("audio_classification", "wav2vec2"),
    ("ctc", "wav2vec2"),
    ("speech_seq2seq", "whisper"),
    ("image_text_to_text", "llava"),
    ("image_text_to_text", "qwen2_vl"),
]
SETTINGS = {
    "hidden_size": 4096,
    "num_hidden_layers": 6,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32_000,
    "bos_token_id": 1,
    "eos_token_id": [31_000, 31_001],
    "image_token_id": 31_001,
    "layer_types": ["sliding", "sliding", "full"] * 2,
    "dtypes_of_layers": list("abcdef"),
    "rms_norm_eps": 1e-6,
    "tie_word_embeddings": False,
    "vision_config": {"hidden_size": 1152, "depth": 27, "image_token_id": 31_001},
}


@pytest.mark.parametrize(("kind", "name"), SAMPLE)
def test_an_architecture_is_not_scored_wrong(kind, name):
    row = make_row(kind, name)
    assert row["built"], row["why"]
    assert status(row) != WRONG, sweep.line(row)


def test_sizes_become_small_by_their_names():
    small = shrunk(SETTINGS)
    assert (small["hidden_size"], small["vocab_size"]) == (WIDTH, VOCABULARY)
    assert (small["num_attention_heads"], small["num_key_value_heads"]) == (HEADS, HEADS // 2)
    assert small["vision_config"]["hidden_size"] == WIDTH
    assert small["vision_config"]["depth"] == LAYERS
    assert small["rms_norm_eps"] == 1e-6
    assert small["tie_word_embeddings"] is False
    assert SETTINGS["hidden_size"] == 4096, "the settings given stay as they are"


def test_every_kind_of_layer_stays_once():
    small = shrunk(SETTINGS)
    assert small["layer_types"] == ["sliding", "full"]
    assert small["num_hidden_layers"] == 2
    assert small["dtypes_of_layers"] == ["a", "b"], "lists that have an entry a layer follow"
    assert shrunk({"layer_types": ["full"] * 9})["layer_types"] == ["full", "full"]


def test_tokens_beyond_the_small_vocabulary_move_into_it_and_stay_the_same_ones():
    small = shrunk(SETTINGS)
    first, second = small["eos_token_id"]
    assert small["bos_token_id"] == 1
    assert first != second
    assert max(first, second) < VOCABULARY
    assert second == small["image_token_id"] == small["vision_config"]["image_token_id"]


def test_numbers_that_are_small_already_stay():
    assert shrunk({"hidden_size": 16, "num_layers": 1}) == {"hidden_size": 16, "num_layers": 1}


def test_as_many_heads_for_keys_as_for_queries_stay_as_many():
    small = shrunk({"num_attention_heads": 32, "num_key_value_heads": 32})
    assert small["num_key_value_heads"] == small["num_attention_heads"] == HEADS


def test_shortened_settings_keep_their_widths():
    short = shortened(SETTINGS)
    assert short["hidden_size"] == 4096
    assert short["num_hidden_layers"] == 2
    assert short["vocab_size"] == VOCABULARY
    assert short["vision_config"]["depth"] == LAYERS
    assert short["image_token_id"] == short["vision_config"]["image_token_id"] < VOCABULARY


def test_a_shrunk_configuration_is_one_of_its_class():
    small = shrunk(configuration_class("qwen2_vl")().to_dict(), "qwen2_vl")
    config = configuration_class("qwen2_vl").from_dict(small)
    assert config.text_config.hidden_size == WIDTH
    assert config.image_token_id < config.text_config.vocab_size


def test_every_kind_lists_architectures():
    assert {name: len(architectures(kind)) > 3 for name, kind in KINDS.items()} == dict.fromkeys(
        KINDS, True
    )


def test_texts_hold_no_special_token():
    config = candidates(KINDS["masked_lm"], "bert")[0]
    config.mask_token_id = 50
    assert 50 in special_tokens(config)
    texts = Words(config, seed=0).texts()
    assert [len(text) for text in texts] == list(LENGTHS)
    assert not any((text == 50).any() for text in texts)


def test_a_score_may_be_off_by_the_margin_and_no_more():
    assert judge([1.0, 20.0], [1.0 + MARGIN / 2, 20.0 + 15 * MARGIN])[0] == RIGHT
    verdict, error, wrong = judge([1.0, 20.0, 3.0], [1.0, 20.0 + 25 * MARGIN, 3.0])
    assert (verdict, wrong) == (WRONG, [1])
    assert error == pytest.approx(25 * MARGIN)


def test_a_low_precision_may_be_off_by_twice_the_plain_forwards_error():
    assert judge([1.02], [1.0], plain_error=0.01)[0] == RIGHT
    assert judge([1.022], [1.0], plain_error=0.01)[0] == WRONG


@pytest.mark.parametrize("losses", [[1.0, math.nan], [1.0]])
def test_a_missing_score_is_wrong(losses):
    verdict, error, _ = judge(losses, [1.0, 2.0])
    assert (verdict, error) == (WRONG, math.inf)


@pytest.mark.parametrize(
    ("explanation", "word"),
    [
        ("causal_lm; full logits, one sample at a time; 2 packs", "alone"),
        ("causal_lm; packed segments, a prefix run once", "packed"),
        ("masked_lm; a tiled head, samples padded (masked_lm is not causal, not packed)", "padded"),
        ("cross_entropy in batches of like length", "by like length"),
        ("causal_lm; packed segments; 8 samples checked against each alone", "packed"),
        ("cross_entropy in float32 on cpu; 1 pack of at most 64 samples", "padded"),
    ],
)
def test_how_samples_were_laid_out_is_read_off_the_explanation(explanation, word):
    assert how(explanation) == word


@pytest.fixture(scope="module")
def llama():
    return make_case(KINDS["causal_lm"], "llama")


def test_a_model_that_is_not_what_the_truth_was_taken_of_is_wrong(llama):
    model = llama.model
    with torch.no_grad():
        model.model.norm.weight.mul_(1.5)
    try:
        part = score(llama, torch.float32)
    finally:
        with torch.no_grad():
            model.model.norm.weight.div_(1.5)
    assert part["verdict"] == WRONG
    assert part["wrong"] == list(range(len(LENGTHS)))


def test_one_wrong_sample_of_a_dozen_makes_a_row_wrong(llama):
    truths = [*llama.truths[:-1], llama.truths[-1] * 1.01]
    case = dataclasses.replace(llama, truths=truths)
    assert score(llama, torch.float32)["verdict"] == RIGHT
    assert score(case, torch.float32)["wrong"] == [len(LENGTHS) - 1]


def test_the_error_of_bfloat16_is_that_of_the_plain_forward_beside_it(llama):
    part = score(llama, torch.bfloat16)
    assert 0 < part["plain_error"] < 0.5
    assert part["verdict"] == RIGHT
    assert next(llama.model.parameters()).dtype == torch.float32, "the model is cast in a copy"


def test_a_routers_loss_is_taken_off_the_truth():
    kind = KINDS["causal_lm"]
    config = candidates(kind, "mixtral")[0]
    without_routers = case_of(kind, copy.deepcopy(config))
    config.output_router_logits, config.router_aux_loss_coef = True, 0.5
    case = case_of(kind, config)
    batch = case.data.collate(case.data.samples[:1])
    assert case.model(**batch).loss > case.truths[0] + 0.1
    assert case.truths == pytest.approx(without_routers.truths, abs=1e-5)


def test_the_truth_of_a_model_without_a_loss_is_that_of_its_kind(llama):
    class Bare(torch.nn.Module):
        config = llama.model.config

        def forward(self, input_ids, attention_mask):
            output = llama.model(input_ids=input_ids, attention_mask=attention_mask)
            return type(output)(logits=output.logits)

    losses = true_losses(Bare(), llama.data.samples, llama.data.collate, llama.kind)
    assert losses == pytest.approx(llama.truths, abs=1e-5)


def answer(kind, name):
    if name == "crash":
        os.kill(os.getpid(), signal.SIGSEGV)
    if name == "hang":
        time.sleep(60)
    if name == "fault":
        raise KeyError("a fault of the sweep")
    return {"built": False, "why": f"a row of {name}"}


def test_a_crash_or_a_hang_ends_one_row_only():
    tasks = [("k", name) for name in ("one", "crash", "hang", "fault", "two")]
    rows = list(rows_of(tasks, answer, limit=5, jobs=2))
    assert [row["name"] for row in rows] == ["one", "crash", "hang", "fault", "two"]
    assert [row["why"] for row in rows] == [
        "a row of one",
        "crash: SIGSEGV",
        "more than 5 s",
        "the sweep: KeyError: 'a fault of the sweep'",
        "a row of two",
    ]
    assert [status(row) for row in rows][2] == "too slow"


def test_the_command_keeps_rows_and_goes_on_where_it_stopped(tmp_path, capsys):
    command = ["--kinds", "masked_lm", "--only", "bert", "--output", str(tmp_path)]
    sweep.main(command)
    path = tmp_path / "sweep.jsonl"
    row = json.loads(path.read_text())
    assert (row["kind"], row["name"], status(row)) == ("masked_lm", "bert", RIGHT)
    with path.open("a") as file:
        file.write('{"kind": "masked_lm", "na')  # as a kill leaves it
    sweep.main(command)
    assert len(path.read_text().splitlines()) == 2, "no row is made twice"
    assert "1 right; 1 in all." in capsys.readouterr().out
    assert "| bert | right, padded" in (tmp_path / "sweep.md").read_text()


def test_the_table_shows_the_worse_of_two_precisions():
    part = {"loss": "auto", "how": "packed", "plain_error": None, "why_no_plain_error": ""}
    right, wrong = part | {"verdict": RIGHT, "error": 1e-7}, part | {"verdict": WRONG, "error": 2.0}
    row = {"kind": "causal_lm", "name": "a|b", "built": True}
    row |= {"float32": right, "bfloat16": wrong | {"wrong": [3], "plain_error": 0.01}}
    text = table([row], benchmark_rows.machine())
    assert "1 WRONG; 1 in all." in text
    assert "| a\\|b | right, packed, 1e-07 | WRONG, packed, 2 (0.01), samples [3] |" in text
