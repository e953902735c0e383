"""Stores made on the command line know their rows: the right ones are taken, others refused."""

import json

import datasets
import pytest
import torch

from flowdata import FlowWeightedDataset, ScoreMismatchError, Scores
from flowdata.integrations.transformers import FlowTrainer
from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.store.fingerprint.rows import RowsDigest, first_difference
from flowdata.text import load_model, load_tokenizer, read_rows, tokenize_rows
from tests.test_cli import run
from tests.test_growing import model_folder, write
from tests.test_text import tokenizer

__all__ = ["model_folder", "tokenizer"]  # fixtures

PAIRS = [
    {"question": f"{n}+1=", "answer": "x" * (n % 5 + 1), "id": n, "system": None} for n in range(9)
]
CHATS = [
    {
        "messages": [
            {"role": "user", "content": f"{n}?"},
            {"role": "assistant", "content": "y" * (n + 1), **({"weight": 1} if n % 2 else {})},
        ],
        "source": {"page": n},
    }
    for n in range(6)
]
TEMPLATE = (
    "{% for m in messages %}<{{ m.role }}>{% if m.role == 'assistant' %}{% generation %}"
    "{{ m.content }}</s>{% endgeneration %}{% else %}{{ m.content }}{% endif %}{% endfor %}"
)


@pytest.fixture(params=["pairs", "chats"])
def scored(request, capsys, model_folder, tmp_path):
    """Rows, the file that holds them, and the scores that the command line made of it."""
    rows = PAIRS if request.param == "pairs" else CHATS
    file = write(tmp_path / "rows.jsonl", rows)
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template) if rows is CHATS else ()
    store = tmp_path / "store"
    code, _, err = run(
        capsys, "score", model_folder, file, "--store", store, "--dtype", "float32", *options
    )
    assert code == 0, err
    return rows, file, Scores.load(store)


def scored_as_text(capsys, model_folder, file, store):
    assert run(capsys, "score", model_folder, file, "--store", store, "--no-template")[0] == 0
    return Scores.load(store)


def hf(rows):
    return datasets.Dataset.from_list(rows)


def test_the_rows_are_taken_however_they_were_loaded(scored, tmp_path):
    rows, file, scores = scored
    weights = scores.weights()
    table = datasets.load_dataset("json", data_files=str(file), split="train", cache_dir=tmp_path)
    table.save_to_disk(tmp_path / "saved")
    table.to_parquet(tmp_path / "rows.parquet")
    for same in (
        rows,
        tuple(rows),
        [json.loads(line) for line in file.read_text().splitlines()],
        table,
        hf(rows),
        datasets.load_from_disk(tmp_path / "saved"),
        datasets.Dataset.from_parquet(str(tmp_path / "rows.parquet"), cache_dir=str(tmp_path)),
        table.add_column("length", [7] * len(rows)),
        table.with_format("torch"),
        table.with_transform(lambda batch: {"tokens": [[1]] * len(next(iter(batch.values())))}),
        table.select(range(len(rows))),
        torch.utils.data.Subset(rows, range(len(rows))),
    ):
        assert torch.equal(FlowWeightedDataset(same, scores).weights, weights)
    assert scores.to_column(table)["weight"] == pytest.approx(weights.tolist())


def test_other_rows_and_orders_are_refused(scored):
    rows, _, scores = scored
    table = hf(rows)
    column = "question" if rows is PAIRS else "messages"
    changed = json.loads(json.dumps(rows))
    if rows is PAIRS:
        changed[3]["answer"] += "!"
    else:
        changed[3]["messages"][1]["content"] += "!"
    swapped = [rows[1], rows[0], *rows[2:]]
    for other, message in (
        (rows[::-1], "same in another order"),
        (swapped, "same in another order"),
        (table.shuffle(seed=3), "same in another order"),
        (hf(swapped), "same in another order"),
        (changed, "others, or hold something else"),
        (hf(changed), "others, or hold something else"),
        ([rows[0], *rows[:-1]], "others, or hold something else"),
        (table.remove_columns([column]), f"no column '{column}'"),
        (table.rename_column(column, "text"), f"no column '{column}'"),
        ([{**row, "system": "Be brief."} for row in rows], "column 'system' holds something"),
        (["text"] * len(rows), "are no rows, but of str"),
        ([torch.zeros(2)] * len(rows), "are no rows, but of Tensor"),
        (rows[1:], "the data set has"),
    ):
        with pytest.raises(ScoreMismatchError, match=message):
            FlowWeightedDataset(other, scores)
        FlowWeightedDataset(other, scores.weights()[: len(other)])  # the remedy
    with pytest.raises(ScoreMismatchError, match="another order"):
        scores.to_column(table.shuffle(seed=3))


def test_rows_that_are_tokens_alone_are_told_by_them(capsys, model_folder, tmp_path):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    scores = scored_as_text(capsys, model_folder, file, tmp_path / "s")
    samples = tokenize_rows(read_rows(str(file)), load_tokenizer(model_folder), template=False)
    lists = [{name: value.tolist() for name, value in sample.items()} for sample in samples]
    width = max(map(len, samples))
    padded = [
        {
            "input_ids": s["input_ids"] + [0] * (width - len(s["input_ids"])),
            "attention_mask": [1] * len(s["input_ids"]) + [0] * (width - len(s["input_ids"])),
            "labels": s["labels"] + [-100] * (width - len(s["input_ids"])),
        }
        for s in lists
    ]
    for same in (
        samples,
        lists,
        hf(lists),
        hf(lists).with_format("torch"),
        hf(lists).remove_columns("labels"),
        hf(padded),
    ):
        FlowWeightedDataset(same, scores)
    other_targets = [{**s, "labels": s["input_ids"]} for s in lists]
    for other, message in (
        (lists[::-1], "others than those that were scored, or in another order"),
        (hf(lists).shuffle(seed=1), "in another order"),
        (hf(other_targets), "other ones are targets"),
        (hf(lists).rename_column("input_ids", "tokens"), "no column"),
    ):
        with pytest.raises(ScoreMismatchError, match=message):
            FlowWeightedDataset(other, scores)


def test_the_trainers_take_the_right_rows_alone(capsys, model_folder, tmp_path, caplog):
    from transformers import TrainingArguments
    from trl import SFTConfig

    pairs = [{"prompt": row["question"], "completion": row["answer"]} for row in PAIRS]
    file = write(tmp_path / "rows.jsonl", pairs)
    scores, table = scored_as_text(capsys, model_folder, file, tmp_path / "s"), hf(pairs)
    options = {"max_steps": 1, "use_cpu": True, "bf16": False, "report_to": []}
    config = SFTConfig(str(tmp_path / "sft"), **options)
    sft = {"processing_class": load_tokenizer(model_folder), "scores": scores}
    trainer = FlowSFTTrainer(load_model(model_folder), config, train_dataset=table, **sft)
    assert trainer.train_dataset["weight"] == pytest.approx(scores.weights().tolist())
    assert "other tokens" not in caplog.text
    cut = SFTConfig(str(tmp_path / "sft"), max_length=4, **options)
    FlowSFTTrainer(load_model(model_folder), cut, train_dataset=table, **sft)
    assert "cuts them at max_length=4, they were scored under --max-length None" in caplog.text
    with pytest.raises(ScoreMismatchError, match="another order"):
        FlowSFTTrainer(load_model(model_folder), config, train_dataset=table.shuffle(1), **sft)

    samples = tokenize_rows(pairs, load_tokenizer(model_folder), template=False)
    tokens = hf([{name: value.tolist() for name, value in sample.items()} for sample in samples])
    arguments = TrainingArguments(str(tmp_path / "hf"), max_steps=1, use_cpu=True, report_to=[])
    for resample in (False, True):
        FlowTrainer(
            load_model(model_folder),
            arguments,
            train_dataset=tokens,
            scores=scores,
            resample=resample,
        )
        with pytest.raises(ScoreMismatchError, match="another order"):
            FlowTrainer(
                load_model(model_folder),
                arguments,
                train_dataset=tokens.shuffle(1),
                scores=scores,
                resample=resample,
            )


def test_losses_that_are_found_take_the_rows_of_the_new_call(capsys, model_folder, tmp_path):
    first = write(tmp_path / "first.jsonl", PAIRS)
    second = [{"prompt": row["question"], "completion": row["answer"]} for row in PAIRS]
    second_file = write(tmp_path / "second.jsonl", second)
    for file in (first, second_file):
        assert run(capsys, "score", model_folder, file, "--store", tmp_path / "s")[0] == 0
    scores = Scores.load(tmp_path / "s")
    FlowWeightedDataset(second, scores)
    with pytest.raises(ScoreMismatchError, match="no column 'completion'"):
        FlowWeightedDataset(PAIRS, scores)
    assert run(capsys, "verify", tmp_path / "s")[0] == 0


def test_rows_that_could_not_be_read_have_their_place(capsys, model_folder, tmp_path):
    rows = [*PAIRS[:3], {"question": None, "answer": "x"}, *PAIRS[3:]]
    file = write(tmp_path / "rows.jsonl", rows)
    command = ("score", model_folder, file, "--store", tmp_path / "s", "--on-error", "skip")
    assert run(capsys, *command)[0] == 0
    scores = Scores.load(tmp_path / "s")
    assert FlowWeightedDataset(rows, scores, missing="zero").weights[3] == 0
    with pytest.raises(ScoreMismatchError, match="another order"):
        FlowWeightedDataset(rows[::-1], scores, missing="zero")


@pytest.mark.parametrize(
    ("one", "other", "are_same"),
    [
        ({"a": 1}, {"a": 1.0}, True),
        ({"a": "007"}, {"a": 7}, False),
        ({"a": ""}, {"a": None}, True),
        ({"a": ""}, {}, True),
        ({"a": [{"b": None, "c": "x"}]}, {"a": [{"c": "x"}]}, True),
        ({"a": ["x", "y"]}, {"a": ("x", "y")}, True),
        ({"a": ["x", "y"]}, {"a": ["xy"]}, False),
        ({"a": [None, "x"]}, {"a": ["x"]}, False),
        ({"a": False}, {"a": None}, False),
        ({"a": 0}, {"a": None}, False),
        ({"a": "x", "z": 1}, {"a": "x", "z": 2}, True),
        ({"a": "\ud800"}, {"a": "\ud801"}, False),
    ],
)
def test_what_counts_in_a_row(one, other, are_same):
    digests = [RowsDigest(["a", "b"]), RowsDigest(["b", "a"])]
    for digest, row in zip(digests, (one, other), strict=True):
        digest.add(row)
    first, second = (digest.identity()["rows"] for digest in digests)
    assert (first == second) == are_same


def identity_of(texts):
    digest = RowsDigest(["text"])
    for text in texts:
        digest.add({"text": text})
    return digest.identity()


@pytest.mark.parametrize("count", [1, 7, 511, 512, 513, 1024, 1500, 5000])
def test_the_first_row_that_differs_is_found(count):
    texts = [str(number) for number in range(count)]
    scored = identity_of(texts)
    assert len(scored["marks"]) <= 8 * 512
    assert first_difference(scored, identity_of(texts)) is None
    for place in {0, count // 3, count - 1}:
        first, last = first_difference(
            scored, identity_of([*texts[:place], "new", *texts[place + 1 :]])
        )
        assert first <= place <= last < count
        assert last - first < max(1, count / 128)
        first, last = first_difference(scored, identity_of([*texts[:place], "new", *texts[place:]]))
        assert first <= place <= last <= count
    if count > 1:
        first, last = first_difference(identity_of(texts[:-1]), scored)
        assert first <= count - 1 <= last
    earlier = {name: value for name, value in scored.items() if name not in ("step", "marks")}
    assert first_difference(earlier, identity_of(["new"])) is None  # of earlier versions


def test_stores_of_other_rows_or_tokens_are_not_compared(capsys, model_folder, tmp_path):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    turned = write(tmp_path / "turned.jsonl", PAIRS[::-1])
    score = ("score", model_folder, "--quiet", "--dtype", "float32", "--store")
    for store, data, options in (
        ("one", file, ()),
        ("turned", turned, ()),
        ("cut", file, ("--max-length", 28)),
        ("plain", file, ("--no-template",)),
    ):
        assert run(capsys, *score, tmp_path / store, data, *options)[0] == 0
    for store, message in (
        ("turned", "its rows are the same in another order; the first is row 0"),
        ("cut", "another greatest length (before None, after 28)"),
        ("plain", "another use of the chat template (before True, after False)"),
    ):
        code, _, err = run(capsys, "report", tmp_path / "one", "--after", tmp_path / store)
        assert code == 2
        assert message in err
