"""`flowdata weigh`: scored rows with their weights, in a file."""

import json
from pathlib import Path

import datasets
import pytest
import torch
from trl import SFTConfig

from flowdata import FlowWeightedDataset, Scores, flow_weights
from flowdata.integrations.trl import FlowSFTTrainer
from flowdata.scores.of_targets import weigh_targets
from flowdata.text import load_model, load_tokenizer
from flowdata.text.formats import Fields
from flowdata.text.weighted_rows import WeightedColumns, weigh_rows
from tests.test_cli import run
from tests.test_growing import model_folder, rows_of, write
from tests.test_rows import CHATS, PAIRS, TEMPLATE
from tests.test_text import tokenizer

__all__ = ["model_folder", "tokenizer"]  # fixtures

ODD = [  # what a reader through Arrow or pandas would change
    {"prompt": "2020-01-01", "completion": "007", "n": 1, "extra": {"a": None, "b": [1, 2.5]}},
    {"prompt": "é\u2028x", "completion": "NA", "n": 1.5, "late": True},
    {"prompt": "q", "completion": " None ", "n": 10**20, "extra": [], "weights": None},
]


@pytest.fixture
def score(capsys, model_folder, tmp_path):
    """Score a file into a store; returns both."""

    def score_file(file, *options, store="store"):
        place = tmp_path / store
        command = ("score", model_folder, file, "--store", place, "--dtype", "float32")
        code, _, err = run(capsys, *command, *options)
        assert code == 0, err
        return place

    return score_file


def lines_of(file):
    return [json.loads(line) for line in Path(file).read_text().split("\n") if line]


def table_of(path):
    """The rows of a file of any kind that is written."""
    if path.suffix == ".jsonl":
        return lines_of(path)
    if path.suffix == ".parquet":
        cache = path.with_name("cache")
        return datasets.Dataset.from_parquet(str(path), cache_dir=str(cache)).to_list()
    return datasets.load_from_disk(path).to_list()


def weigh(capsys, store, output, *options):
    code, out, err = run(capsys, "weigh", store, "--output", output, "--json", *options)
    assert code == 0, err
    return json.loads(out), err


def without(rows, *names):
    return [{name: value for name, value in row.items() if name not in names} for row in rows]


@pytest.mark.parametrize("rows", [PAIRS, ODD])
def test_rows_come_out_as_they_were_with_their_weight(capsys, score, tmp_path, rows):
    store = score(write(tmp_path / "rows.jsonl", rows))
    facts, _ = weigh(capsys, store, tmp_path / "out.jsonl")
    written = lines_of(tmp_path / "out.jsonl")
    assert without(written, "weight") == rows
    assert [list(row)[:-1] for row in written] == [list(row) for row in rows]
    assert [row["weight"] for row in written] == Scores.load(store).weights().tolist()
    assert facts["rows"] == facts["written"] == len(rows)
    assert facts["mean_weight"] == pytest.approx(Scores.load(store).weights().mean().item())


@pytest.mark.parametrize("kind", ["jsonl", "json", "csv", "parquet", "saved", "jsonl.gz", "arrow"])
@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out"])
def test_every_kind_of_file_goes_into_every_kind(capsys, score, tmp_path, kind, output):
    rows = [{"prompt": f"{n}?", "completion": "y" * (n + 1), "tag": f"0{n}"} for n in range(5)]
    table, file = datasets.Dataset.from_list(rows), tmp_path / f"rows.{kind}"
    if kind == "saved":
        table.save_to_disk(file)
    elif kind == "parquet":
        table.to_parquet(file)
    elif kind == "arrow":
        table.save_to_disk(tmp_path / "other")
        next((tmp_path / "other").glob("*.arrow")).rename(file)
    elif kind == "csv":
        table.to_csv(file)
    elif kind == "json":
        file.write_text(json.dumps(rows))
    else:
        table.to_json(file, compression="gzip" if kind.endswith("gz") else None)
    store = score(file)
    weigh(capsys, store, tmp_path / output, "--loss", "--keep-above", 0.5)
    path = tmp_path / output
    if output == "out.jsonl":
        written = lines_of(path)
    elif output == "out":
        written = datasets.load_from_disk(path).to_list()
    else:
        written = datasets.Dataset.from_parquet(str(path), cache_dir=str(tmp_path)).to_list()
    scores = Scores.load(store)
    assert without(written, "weight", "loss", "keep") == rows
    assert [row["loss"] for row in written] == scores.losses.tolist()
    assert [row["weight"] for row in written] == scores.weights().tolist()
    assert [row["keep"] for row in written] == (scores.weights() >= 0.5).tolist()
    assert not list(tmp_path.glob(".out*"))


def test_parquet_keeps_types_and_nulls(capsys, score, tmp_path):
    import datetime

    table = datasets.Dataset.from_dict(
        {
            "prompt": ["a?", "b?", "c?"],
            "day": [datetime.date(2020, 1, n + 1) for n in range(3)],
            "small": [1, None, 3],
            "completion": ["x", "yy", "zzz"],
            "meta": [{"a": 1, "b": None}, {"a": None, "b": "t"}, None],
        }
    ).cast_column("small", datasets.Value("int8"))
    table.to_parquet(tmp_path / "rows.parquet")
    store = score(tmp_path / "rows.parquet")
    weigh(capsys, store, tmp_path / "out.parquet")
    back = datasets.Dataset.from_parquet(str(tmp_path / "out.parquet"), cache_dir=str(tmp_path))
    assert back.column_names == [*table.column_names, "weight"]
    assert back.remove_columns("weight").features == table.features
    assert back.remove_columns("weight").to_list() == table.to_list()
    code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert "row 0 holds what JSON can't" in err
    assert ".parquet, which keeps types" in err
    assert not (tmp_path / "out.jsonl").exists()


def test_weights_are_made_as_asked(capsys, score, tmp_path):
    store = score(write(tmp_path / "rows.jsonl", PAIRS), "--token-losses")
    options = ("--temperature", 2, "--normalize", "mean", "--max-weight", 1.25)
    weigh(capsys, store, tmp_path / "a.jsonl", *options, "--weight-column", "w", "--token-weights")
    scores = Scores.load(store)
    written = lines_of(tmp_path / "a.jsonl")
    expected = scores.weights(2.0, normalize="mean", max_weight=1.25)
    assert [row["w"] for row in written] == expected.tolist()
    for row, weights in zip(written, weigh_targets(scores, temperature=2.0), strict=True):
        assert row["token_weights"] == weights.tolist()
        assert len(row["token_weights"]) == len(row["answer"]) + 1


def test_token_weights_need_token_losses(capsys, score, tmp_path):
    store = score(write(tmp_path / "rows.jsonl", PAIRS))
    code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "a.jsonl", "--token-weights")
    assert code == 2
    assert "no token losses; score with --token-losses" in err


def test_rows_without_a_loss_are_said_and_null_or_left_out(capsys, score, tmp_path):
    file = tmp_path / "rows.jsonl"
    rows = [*PAIRS[:2], {"question": None, "answer": "x"}, *PAIRS[2:]]
    text = [json.dumps(row) for row in rows]
    file.write_text("\n".join([text[0], "{torn", *text[1:]]) + "\n")
    store = score(file, "--on-error", "skip")
    facts, err = weigh(capsys, store, tmp_path / "null.jsonl", "--keep-above", 0.1, "--loss")
    assert "1 of 11 rows have no loss (row 3: column 'question'" in err
    assert "the first is row 3" in err
    assert "--missing drop leaves them out" in err
    assert "keeps no row" not in err
    assert "1 lines of the data are no rows and are left out; the first: " in err
    assert "line 2: not JSON" in err
    assert (facts["rows"], facts["written"], facts["without_loss"]) == (11, 10, 1)
    written = lines_of(tmp_path / "null.jsonl")
    assert without(written, "weight", "keep", "loss") == rows
    assert [written[2][name] for name in ("weight", "keep", "loss")] == [None, None, None]
    losses = Scores.load(store).losses
    weights = flow_weights(losses[~losses.isnan()])
    assert [r["weight"] for n, r in enumerate(written) if n != 2] == weights.tolist()

    facts, err = weigh(capsys, store, tmp_path / "left.parquet", "--missing", "drop")
    assert "are left out; the first is row 3" in err
    back = datasets.Dataset.from_parquet(str(tmp_path / "left.parquet"), cache_dir=str(tmp_path))
    assert back["question"] == [row["question"] for row in PAIRS]
    assert back["weight"] == weights.tolist()
    mean = ("--missing", "drop", "--normalize", "mean", "--keep-above", 9)
    assert (
        "--keep-above 9 keeps no row: the mean weight is 1"
        in weigh(capsys, store, tmp_path / "mean.jsonl", *mean)[1]
    )
    means = torch.tensor([row["weight"] for row in lines_of(tmp_path / "mean.jsonl")])
    assert means.mean().item() == pytest.approx(1.0)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda rows: rows[::-1], "same in another order; the first is row 0 (rows count from 0)."),
        (
            lambda rows: [*rows[:4], rows[6], rows[5], rows[4], *rows[7:]],
            "the first is row 4 (rows count",
        ),
        (
            lambda rows: [*rows[:3], {**rows[3], "answer": "no"}, *rows[4:]],
            "rows are others, or hold something else in 'answer', 'question'; the first is row 3 ",
        ),
        (lambda rows: rows[:-1], "it has 8 rows, 9 were scored"),
        (lambda rows: [*rows, rows[0]], "more than the 9 rows scored"),
        (lambda rows: [{**row, "system": "Be brief."} for row in rows], "'system' holds something"),
        (lambda rows: without(rows, "answer"), "rows are others"),
    ],
)
@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out"])
def test_a_changed_file_is_refused_and_nothing_is_written(
    capsys, score, tmp_path, change, message, output
):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    store = score(file)
    write(file, change(PAIRS))
    code, out, err = run(capsys, "weigh", store, "--output", tmp_path / output)
    assert (code, out) == (2, "")
    assert "is not what was scored" in err
    assert message in err
    assert not (tmp_path / output).exists()
    assert not list(tmp_path.glob(".out*"))


def test_what_was_not_read_may_change_and_the_file_may_move(capsys, score, tmp_path):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    store = score(file)
    file.unlink()
    code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "out.jsonl")
    assert code == 2
    assert "--data says where the data is now" in err
    rows = [{**row, "id": "new", "also": [n]} for n, row in enumerate(PAIRS)]
    moved = write(tmp_path / "moved.jsonl", rows)
    weigh(capsys, store, tmp_path / "out.jsonl", "--data", moved)
    assert without(lines_of(tmp_path / "out.jsonl"), "weight") == rows


def test_the_first_rows_are_written_where_they_alone_were_scored(capsys, score, tmp_path):
    file = write(tmp_path / "rows.jsonl", rows_of(12))
    store = score(file, "--limit", 5)
    weigh(capsys, store, tmp_path / "five.jsonl")
    assert without(lines_of(tmp_path / "five.jsonl"), "weight") == rows_of(5)
    score(file, "--limit", 9)
    weigh(capsys, store, tmp_path / "nine.jsonl")
    assert without(lines_of(tmp_path / "nine.jsonl"), "weight") == rows_of(9)
    score(file)
    weigh(capsys, store, tmp_path / "all.parquet")
    assert len(datasets.Dataset.from_parquet(str(tmp_path / "all.parquet"))) == 12


def test_chats_have_the_weight_in_their_replies(capsys, score, tmp_path):
    chats = [
        {
            "messages": [
                {"role": "user", "content": "a?", "id": 1},
                {"role": "assistant", "content": "no", "loss_weight": 0},
                {"role": "user", "content": "b?"},
                {"role": "assistant", "content": "y" * (n + 1), "loss_weight": 0.5},
                {"role": "user", "content": "c?"},
                {"role": "assistant", "content": "z"},
            ],
            "id": n,
        }
        for n in range(4)
    ]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    file = write(tmp_path / "chats.jsonl", chats)
    store = score(file, "--chat-template", template)
    for output in ("out.jsonl", "out"):
        weigh(capsys, store, tmp_path / output, "--message-weight", "loss_weight")
    saved = datasets.load_from_disk(tmp_path / "out").to_list()
    written = lines_of(tmp_path / "out.jsonl")
    for number, row in enumerate(written):
        weight = row["weight"]
        messages = row["messages"]
        expected = [None, 0.0, None, weight * 0.5, None, weight]
        assert [message.get("loss_weight") for message in messages] == expected
        assert [m["loss_weight"] for m in saved[number]["messages"]] == expected
        assert without(messages, "loss_weight") == without(chats[number]["messages"], "loss_weight")
        assert row["id"] == number


@pytest.mark.parametrize("name", ["loss_weight", "loss_scale"])
def test_sharegpt_and_pairs_have_it_too(capsys, score, tmp_path, name):
    chats = [
        {"conversations": [{"from": "human", "value": "a?"}, {"from": "gpt", "value": "b" * n}]}
        for n in range(1, 4)
    ]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template)
    store = score(write(tmp_path / "chats.jsonl", chats), *options, store="chats")
    weigh(capsys, store, tmp_path / "a.jsonl", "--message-weight", name)
    for row, chat in zip(lines_of(tmp_path / "a.jsonl"), chats, strict=True):
        question, reply = chat["conversations"]
        assert row["conversations"] == [question, {**reply, name: row["weight"]}]

    rows = [{"instruction": "Add.", "input": f"{n}", "output": "4" * n} for n in range(1, 5)]
    store = score(write(tmp_path / "pairs.jsonl", rows), store="pairs")
    weigh(capsys, store, tmp_path / "b.jsonl", "--message-weight", name)
    for number, row in enumerate(lines_of(tmp_path / "b.jsonl")):
        assert {column: row[column] for column in rows[0]} == rows[number]
        assert row["messages"] == [
            {"role": "user", "content": f"Add.\n{number + 1}"},
            {"role": "assistant", "content": rows[number]["output"], name: row["weight"]},
        ]


def test_a_row_without_a_loss_weighs_nothing_in_its_messages(capsys, score, tmp_path):
    long = [{"role": "user", "content": "?" * 200}, {"role": "assistant", "content": "y"}]
    rows = [*CHATS[:2], {"messages": long}, {"messages": long[:1]}, *CHATS[2:]]
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    file = write(tmp_path / "chats.jsonl", rows)
    options = ("--chat-template", template, "--on-error", "skip", "--max-length", 100)
    store = score(file, *options)
    assert Scores.load(store).losses.isnan().nonzero().flatten().tolist() == [2, 3]
    weigh(capsys, store, tmp_path / "a.jsonl", "--message-weight", "loss_weight")
    written = lines_of(tmp_path / "a.jsonl")
    cut = {"messages": [long[0], {**long[1], "loss_weight": 0.0}], "weight": None}
    assert written[2:4] == [cut, {**rows[3], "weight": None}]
    assert written[1]["messages"][1]["loss_weight"] == written[1]["weight"] > 0


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out"])
def test_a_row_that_can_not_be_read_is_written_as_it_is_beside_chats_as_text(
    capsys, score, tmp_path, output
):
    text = json.dumps([{"from": "human", "value": "?"}, {"from": "gpt", "value": "yes"}])
    rows = [{"conversations": text}, {"conversations": "[torn"}, {"conversations": text}]
    datasets.Dataset.from_list(rows).to_parquet(tmp_path / "rows.parquet")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    options = ("--chat-template", template, "--on-error", "skip")
    store = score(tmp_path / "rows.parquet", *options)
    weigh(capsys, store, tmp_path / output, "--message-weight", "loss_weight")
    written = table_of(tmp_path / output)
    assert [row["conversations"] for row in written] == [row["conversations"] for row in rows]
    assert written[1].get("messages") is None
    for row in (written[0], written[2]):
        assert row["messages"][1]["loss_weight"] == row["weight"] > 0


@pytest.mark.parametrize("output", ["out.jsonl", "out.parquet", "out"])
def test_weights_go_into_messages_of_several_types_and_names(capsys, score, tmp_path, output):
    rows = [
        {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]},
        {"messages": [{"from": "human", "value": "?"}, {"from": "gpt", "value": "no"}]},
    ]
    names = dict.fromkeys(("role", "content", "from", "value"))
    filled = [{"messages": [names | message for message in row["messages"]]} for row in rows]
    datasets.Dataset.from_list(filled).to_parquet(tmp_path / "names.parquet")
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    store = score(tmp_path / "names.parquet", "--chat-template", template, store="names")
    weigh(capsys, store, tmp_path / output, "--message-weight", "loss_scale")
    for row in table_of(tmp_path / output):
        assert row["messages"][1]["loss_scale"] == row["weight"] > 0

    for row, arguments in zip(rows, ({"x": 1}, {"x": "a", "y": None}), strict=True):
        for message in row["messages"]:
            message["note"] = {"name": "f", "arguments": arguments}
    datasets.Dataset.from_list(rows, on_mixed_types="use_json").to_parquet(tmp_path / "a.parquet")
    store = score(tmp_path / "a.parquet", "--chat-template", template, store="types")
    weigh(capsys, store, tmp_path / output, "--message-weight", "loss_scale", "--overwrite")
    for row, written in zip(rows, table_of(tmp_path / output), strict=True):
        assert written["messages"][1]["loss_scale"] == pytest.approx(written["weight"], 1e-6)
        assert [m["note"] for m in written["messages"]] == [m["note"] for m in row["messages"]]


def test_an_object_that_is_always_empty_names_a_kind_of_file_that_holds_it(capsys, score, tmp_path):
    rows = [{**row, "meta": {}} for row in PAIRS]
    store = score(write(tmp_path / "rows.jsonl", rows))
    code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "out.parquet")
    assert code == 2
    assert "'meta'" in err
    assert "write .jsonl" in err
    assert not list(tmp_path.glob("*out*"))
    weigh(capsys, store, tmp_path / "qwen2.5-weighted")
    assert len(datasets.load_from_disk(tmp_path / "qwen2.5-weighted")) == len(rows)


def test_no_reply_and_no_weight_is_written_over(capsys, score, tmp_path):
    template = tmp_path / "template.jinja"
    template.write_text(TEMPLATE)
    chats = score(write(tmp_path / "c.jsonl", CHATS), "--chat-template", template, store="chats")
    pairs = score(write(tmp_path / "p.jsonl", PAIRS), store="pairs")
    content, column = ("--message-weight", "content"), ("--weight-column", "messages")
    for store, options, message in (
        (chats, content, "messages have a field 'content' already"),
        (pairs, content, "messages have a field 'content' already"),
        (pairs, (*column, "--message-weight", "w"), "must not be named 'messages'"),
    ):
        code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "o.jsonl", *options)
        assert code == 2
        assert message in err
    weigh(capsys, pairs, tmp_path / "o.jsonl", *column)


def test_preference_sets_have_no_weights_in_messages(capsys, score, tmp_path):
    rows = [{"prompt": f"{n}?", "chosen": "y" * n, "rejected": "n"} for n in range(1, 5)]
    store = score(write(tmp_path / "rows.jsonl", rows))
    weigh(capsys, store, tmp_path / "a.jsonl")
    assert without(lines_of(tmp_path / "a.jsonl"), "weight") == rows
    code, _, err = run(
        capsys, "weigh", store, "--output", tmp_path / "b.jsonl", "--message-weight", "loss_weight"
    )
    assert code == 2
    assert "preference set" in err


def test_no_column_and_no_file_is_written_over(capsys, score, tmp_path):
    rows = [{**row, "weight": 3} for row in PAIRS]
    file = write(tmp_path / "rows.jsonl", rows)
    store = score(file)

    def refused(output, *options):
        code, _, err = run(capsys, "weigh", store, "--output", output, *options)
        assert code == 2
        return err

    assert "column 'weight' already; name the weight's with --weight-column" in refused(
        tmp_path / "out.jsonl"
    )
    assert "must not be named 'loss'" in refused(tmp_path / "o.jsonl", "--weight-column", "loss")
    assert "needs a name" in refused(tmp_path / "o.jsonl", "--weight-column", "")
    assert "--keep-above should be a weight" in refused(tmp_path / "o", "--keep-above", "nan")
    fine = ("--weight-column", "flow")
    assert "is there already" in refused(file, *fine)
    assert "is the data itself" in refused(file, *fine, "--overwrite")
    assert "of no kind that is written" in refused(tmp_path / "out.csv", *fine)
    assert "of no kind that is written" in refused(tmp_path / "out.jsonl.gz", *fine)
    assert "a folder of other things" in refused(tmp_path, *fine, "--overwrite")
    assert lines_of(file) == rows
    for output in ("out.jsonl", "out"):
        weigh(capsys, store, tmp_path / output, *fine)
        assert "is there already" in refused(tmp_path / output, *fine)
        weigh(capsys, store, tmp_path / output, *fine, "--overwrite", "--temperature", 9)
    assert without(lines_of(tmp_path / "out.jsonl"), "flow") == rows
    assert without(datasets.load_from_disk(tmp_path / "out").to_list(), "flow") == rows


@pytest.mark.parametrize("pattern", ["{}", "{}/*.jsonl", "{}/**/*.jsonl"])
def test_nothing_is_written_where_it_would_be_read_as_data(capsys, score, tmp_path, pattern):
    folder = tmp_path / "data"
    folder.mkdir()
    file = write(folder / "rows.jsonl", PAIRS)
    store = score(file)
    for output in (file, folder / "more.jsonl"):
        options = ("--data", pattern.format(folder), "--overwrite")
        code, _, err = run(capsys, "weigh", store, "--output", output, *options)
        assert code == 2
        assert "would be read as part of the data" in err
    assert lines_of(file) == PAIRS
    weigh(capsys, store, tmp_path / "out.jsonl", "--data", pattern.format(folder))


def test_columns_of_several_types_are_kept_by_every_kind_of_file(capsys, score, tmp_path):
    reply = [{"role": "assistant", "content": "yes"}]
    rows = [
        {"prompt": "a?", "chosen": "yes", "rejected": "no", "note": {"a": 1}},
        {
            "prompt": [{"role": "user", "content": "b?"}],
            "chosen": reply,
            "rejected": [{"role": "assistant", "content": "no"}],
            "note": {"a": "one"},
        },
        {"prompt": "c?", "chosen": "yes, c", "rejected": "no", "note": 3},
    ]
    store = score(write(tmp_path / "rows.jsonl", rows))
    _, err = weigh(capsys, store, tmp_path / "out.jsonl")
    assert err == ""
    assert without(lines_of(tmp_path / "out.jsonl"), "weight") == rows
    for output in ("out.parquet", "out"):
        _, err = weigh(capsys, store, tmp_path / output)
        assert "columns 'prompt', 'chosen', 'rejected', 'note' hold values of several types" in err
    parquet = datasets.Dataset.from_parquet(
        str(tmp_path / "out.parquet"), cache_dir=str(tmp_path / "cache")
    )
    for table in (parquet, datasets.load_from_disk(tmp_path / "out")):
        assert without(table.to_list(), "weight") == rows
        assert table["weight"] == Scores.load(store).weights().tolist()


def test_what_no_table_holds_is_refused_with_a_kind_of_file_that_does(capsys, score, tmp_path):
    rows = [{**row, "id": 10**20 + n} for n, row in enumerate(PAIRS)]
    store = score(write(tmp_path / "rows.jsonl", rows))
    code, _, err = run(capsys, "weigh", store, "--output", tmp_path / "out.parquet")
    assert code == 2
    assert "too large to convert" in err
    assert "write .jsonl" in err
    weigh(capsys, store, tmp_path / "out.jsonl")
    assert without(lines_of(tmp_path / "out.jsonl"), "weight") == rows


@pytest.mark.parametrize(
    ("message", "factor"),
    [
        ({}, 1.0),
        ({"loss_weight": 0.5}, 0.5),
        ({"weight": 0.25, "train": True}, 0.25),
        ({"weight": 1, "loss_scale": 0.75}, 0.75),  # that of the same name comes first
        ({"train": False}, 0.0),
        ({"content": [{"type": "text", "value": "yes", "loss_weight": 0.5}]}, 0.5),
    ],
)
def test_a_weight_that_a_message_has_stays_a_factor_by_whatever_name(message, factor):
    row = {"messages": [{"role": "user", "content": "?"}, {"role": "assistant", "content": "yes"}]}
    row["messages"][1] |= message
    options = WeightedColumns(temperature=1.0, message_weight="loss_scale")
    rows = weigh_rows(Scores(torch.tensor([2.0])), options, Fields(messages="messages"))
    messages = rows.values_of(0, row)["messages"]
    weight = flow_weights(torch.tensor([2.0]), temperature=1.0).item()
    assert messages[1] == {**row["messages"][1], "loss_scale": pytest.approx(weight * factor)}
    assert messages[0] == row["messages"][0]

    pair = {"prompt": row["messages"][:1], "completion": row["messages"][1:]}
    fields = Fields(prompt="prompt", completion="completion")
    rows = weigh_rows(Scores(torch.tensor([2.0, torch.nan])), options, fields)
    if factor:  # else nothing is to be learned, and such a row has no loss
        as_text = {name: json.dumps(turns) for name, turns in pair.items()}
        for same in (pair, as_text, {**as_text, "prompt": "?"}):
            messages = rows.values_of(0, same)["messages"]
            assert messages[1]["loss_scale"] == pytest.approx(weight * factor)
    assert rows.values_of(1, {"prompt": "?", "completion": None})["messages"] is None


@pytest.mark.parametrize(
    "chat",
    [
        '[{"role": "user", "content": "?"}, {"role": "bot", "content": "yes", "weight": 0.5}]',
        [{"human": "?", "assistant": "yes", "loss_scale": 0.5, "weight": 1}],
        {
            "messages": [
                {"from": "human", "value": "?"},
                {"from": "gpt", "value": "yes", "loss_weight": 0.5},
            ]
        },
    ],
)
def test_a_weight_stays_a_factor_in_every_form_of_a_chat(chat):
    options = WeightedColumns(temperature=1.0, message_weight="loss_scale")
    weights = weigh_rows(Scores(torch.tensor([2.0])), options, Fields(messages="chat"))
    weight = flow_weights(torch.tensor([2.0]), temperature=1.0).item()
    assert weights.values_of(0, {"chat": chat})["messages"] == [
        {"role": "user", "content": "?"},
        {"role": "assistant", "content": "yes", "loss_scale": pytest.approx(weight / 2)},
    ]


def test_a_report_shows_no_text_of_a_changed_file(capsys, score, tmp_path):
    file = write(tmp_path / "rows.jsonl", PAIRS)
    store = score(file)
    page = store / "report" / "report.html"
    pages = {}
    for name, rows in (("same", PAIRS), ("changed", PAIRS[::-1]), ("added", [*PAIRS, PAIRS[0]])):
        write(file, rows)
        code, _, err = run(capsys, "report", store)
        assert code == 0, err
        pages[name] = page.read_text(), err
    assert "3+1=" in pages["same"][0]
    assert "without their text" not in pages["same"][1]
    assert "3+1=" not in pages["changed"][0]
    assert "is not what was scored: its rows are the same in another order" in pages["changed"][1]
    assert "3+1=" in pages["added"][0]  # the first rows are still those that were scored


def test_scores_that_know_no_rows_are_refused(capsys, tmp_path):
    Scores(torch.tensor([1.0, 2.0])).save(tmp_path / "python")
    code, _, err = run(capsys, "weigh", tmp_path / "python", "--output", tmp_path / "a.jsonl")
    assert code == 2
    assert "scores.to_column(dataset)" in err
    earlier = {"details": {"data": {"source": "rows.jsonl", "rows": 2}}}
    Scores(torch.tensor([1.0, 2.0]), metadata=earlier).save(tmp_path / "earlier")
    code, _, err = run(capsys, "weigh", tmp_path / "earlier", "--output", tmp_path / "a.jsonl")
    assert code == 2
    assert "the same flowdata score command notes it" in err
    code, _, err = run(capsys, "weigh", tmp_path / "none", "--output", tmp_path / "a.jsonl")
    assert code == 2


def test_a_written_file_trains_under_trl(capsys, score, model_folder, tmp_path):
    rows = [{"prompt": f"{n}?", "completion": "y" * (n + 1)} for n in range(5)]
    store = score(write(tmp_path / "rows.jsonl", rows), "--no-template")
    for output in ("out.jsonl", "out.parquet"):
        weigh(capsys, store, tmp_path / output)
    weights = Scores.load(store).weights().tolist()
    for kind, file in (("json", "out.jsonl"), ("parquet", "out.parquet")):
        table = datasets.load_dataset(
            kind, data_files=str(tmp_path / file), split="train", cache_dir=str(tmp_path)
        )
        config = SFTConfig(
            str(tmp_path / kind), max_steps=1, use_cpu=True, bf16=False, report_to=[], save_steps=9
        )
        trainer = FlowSFTTrainer(
            load_model(model_folder),
            config,
            train_dataset=table,
            processing_class=load_tokenizer(model_folder),
        )
        assert trainer.train_dataset["weight"] == pytest.approx(weights)
        trainer.train()
        # The command's own output is known for what was scored, too.
        assert torch.equal(
            FlowWeightedDataset(table, Scores.load(store)).weights.double(),
            torch.tensor(weights).double(),
        )
