"""Tokens and labels of text rows: those that TRL's SFTTrainer makes of the same rows."""

import json
from pathlib import Path

import pytest
from datasets import Dataset

pytest.importorskip("trl", minversion="1.15", reason="TRL from 1.15 on needs Python 3.11")

import trl
from trl import SFTConfig, SFTTrainer

from flowdata.text import find_fields, tokenize_rows
from tests.chat_templates import (
    MULTI,
    ROWS,
    SINGLE,
    WEATHER,
    call,
    says,
    sentencepiece_tokenizer,
    tokenizer_with,
)
from tests.models import tiny_llama

TEMPLATES = Path(trl.__file__).parent / "chat_templates"
CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


def family(name):
    return (TEMPLATES / f"{name}.jinja").read_text()


def prepared(tokenizer, rows, folder, **settings):
    """What SFTTrainer trains on: token ids and labels of each row that it keeps."""
    settings = {"max_length": None} | settings
    arguments = SFTConfig(str(folder), use_cpu=True, bf16=False, report_to=[], **settings)
    data = Dataset.from_list(rows)
    model = tiny_llama(vocab_size=len(tokenizer))
    trainer = SFTTrainer(model, arguments, train_dataset=data, processing_class=tokenizer)
    return [(row["input_ids"], row["labels"]) for row in trainer.train_dataset]


def tokenized(tokenizer, rows, **settings):
    """What flowdata scores of the same rows; a row without a target is left out, as TRL does."""
    samples = tokenize_rows(rows, tokenizer, find_fields(rows[0]), template=False, **settings)
    assert not samples.is_split
    pairs = [
        (samples[i]["input_ids"].tolist(), samples[i]["labels"].tolist())
        for i in range(len(samples))
    ]
    return [(ids, labels) for ids, labels in pairs if any(label != -100 for label in labels)]


PAIRS = [
    {"prompt": "Question: what is it?\nAnswer:", "completion": " the reply"},
    {"prompt": "the weather is ", "completion": "there"},  # a token over the seam
    {"prompt": "", "completion": "sunny"},
    {"prompt": "it ends itself ", "completion": "here<eos>"},
]
TURNS = [
    {"prompt": MULTI[:1], "completion": MULTI[1:2]},
    {"prompt": MULTI[:3], "completion": MULTI[3:]},
    {"prompt": [says("system", "Be brief."), *MULTI[:1]], "completion": MULTI[1:]},
]


@pytest.mark.parametrize("with_bos", [False, True])
def test_pairs_of_text(tmp_path, with_bos):
    tokenizer = tokenizer_with(CHATML)
    if with_bos:
        from tokenizers.processors import TemplateProcessing

        bos = ("<bos>", tokenizer.bos_token_id)
        tokenizer.backend_tokenizer.post_processor = TemplateProcessing(
            "<bos> $A", special_tokens=[bos]
        )
        assert tokenizer("a")["input_ids"][0] == bos[1]
    assert tokenized(tokenizer, PAIRS) == prepared(tokenizer, PAIRS, tmp_path)


def test_texts(tmp_path):
    rows = [{"text": "the weather is there"}, {"text": "it was"}]
    tokenizer = tokenizer_with(CHATML)
    assert tokenized(tokenizer, rows) == prepared(tokenizer, rows, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        "qwen3",
        "qwen2_5",
        "llama3",
        "gemma3",
        "phi3",
        "gptoss",
        "deepseekv3",
        "lfm2_2_5",
        "llama3_1",
    ],
)
def test_prompts_and_completions_of_messages(tmp_path, name):
    tokenizer = tokenizer_with(family(name))
    assert tokenized(tokenizer, TURNS) == prepared(tokenizer, TURNS, tmp_path)


@pytest.mark.parametrize(
    "name",
    [
        *("qwen3", "qwen2_5", "qwen3_6", "llama3", "gemma3", "phi3", "gptoss", "glm4moe"),
        *("deepseekv3", "cohere2", "nemotron_3_nano", "muse_glimmer", "lfm2_2_5"),
    ],
)
def test_chats_under_assistant_only_loss(tmp_path, name):
    rows = [ROWS["single"], ROWS["multi"], ROWS["system"]]
    tokenizer = tokenizer_with(family(name))
    expected = prepared(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert tokenized(tokenizer, rows) == expected


@pytest.mark.parametrize("name", ["qwen3", "qwen2_5", "qwen3_6", "nemotron_3_nano", "lfm2_2_5"])
@pytest.mark.parametrize("as_text", [False, True])
def test_tools(tmp_path, name, as_text):
    rows = [ROWS["tools"] | {"tools": json.dumps([WEATHER]) if as_text else [WEATHER]}]
    tokenizer = tokenizer_with(family(name))
    expected = prepared(tokenizer, rows, tmp_path / "chats", assistant_only_loss=True)
    assert tokenized(tokenizer, rows) == expected
    chat, tools = rows[0]["messages"], rows[0]["tools"]
    for cut in (1, 3):
        pairs = [{"prompt": chat[:cut], "completion": chat[cut:], "tools": tools}]
        assert tokenized(tokenizer, pairs) == prepared(tokenizer, pairs, tmp_path / f"{cut}")


def test_reasoning_and_the_rows_own_variables(tmp_path):
    options = {"chat_template_kwargs": {"enable_thinking": False}}
    rows = [ROWS["reasoning"] | options, ROWS["reasoning"] | options]
    tokenizer = tokenizer_with(family("qwen3"))
    expected = prepared(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert tokenized(tokenizer, rows) == expected
    rows = [{"prompt": SINGLE[:1], "completion": SINGLE[1:], **options}]
    assert tokenized(tokenizer, rows) == prepared(tokenizer, rows, tmp_path / "pairs")


@pytest.mark.parametrize("truncation", ["keep_start", "keep_end"])
@pytest.mark.parametrize("max_length", [4, 9, 20, 60])
def test_lengths(tmp_path, max_length, truncation):
    settings = {"max_length": max_length}
    cut = settings | {"truncation_mode": truncation}
    tokenizer = tokenizer_with(family("qwen3"))
    for number, (rows, more) in enumerate(
        [(PAIRS, {}), (TURNS, {}), ([ROWS["multi"], ROWS["system"]], {"assistant_only_loss": True})]
    ):
        expected = prepared(tokenizer, rows, tmp_path / str(number), **cut, **more)
        assert tokenized(tokenizer, rows, truncation=truncation, **settings) == expected


def test_a_call_beside_a_text(tmp_path):
    chat = [
        says("user", "How are Rome and Oslo?"),
        says(
            "assistant",
            "I look it up.",
            tool_calls=[call("weather", city="Rome"), call("weather", city="Oslo")],
        ),
        says("tool", '{"Rome": "sunny"}', name="weather"),
        says("tool", "cold", name="weather"),
        says("assistant", "Go to Rome."),
        says("user", "Thanks"),
    ]
    rows = [{"messages": chat, "tools": [WEATHER]}]
    tokenizer = tokenizer_with(family("qwen3"))
    expected = prepared(tokenizer, rows, tmp_path, assistant_only_loss=True)
    assert tokenized(tokenizer, rows) == expected


@pytest.mark.parametrize("strips", [False, True])
@pytest.mark.parametrize("name", ["phi3", "gemma3", "lfm2_2_5"])
def test_another_kind_of_tokenizer(tmp_path, name, strips):
    tokenizer = sentencepiece_tokenizer(family(name), strips=strips)
    rows = [ROWS["single"], ROWS["multi"]]
    expected = prepared(tokenizer, rows, tmp_path / "chats", assistant_only_loss=True)
    assert tokenized(tokenizer, rows) == expected
    for number, pairs in enumerate((TURNS, PAIRS)):
        pairs = [row for row in pairs if name != "gemma3" or "system" not in str(row)]
        expected = prepared(tokenizer, pairs, tmp_path / str(number))
        assert tokenized(tokenizer, pairs) == expected
