"""Files of rows: every kind is read as it is written, and errors name the file and the line."""

import bz2
import csv
import gzip
import io
import json
import lzma

import datasets
import pyarrow
import pytest

from flowdata._common.unreadable import Unreadable
from flowdata.text import read_rows
from flowdata.text.files.arrays import begin_of, read_array
from flowdata.text.files.places import hub_id

ROWS = [
    {"prompt": "What do bees make?", "completion": "Honey."},
    {"prompt": "Line one\nline two?", "completion": 'Two lines, "quoted", with a comma.'},
    {"prompt": "When?", "completion": "2020-01-01"},
    {"prompt": "Which one?", "completion": "007"},
    {"prompt": "Is it there?", "completion": "NA"},
    {"prompt": "¿Dónde?\u2028", "completion": "None"},
]


def as_lines(rows):
    return "".join(json.dumps(row) + "\n" for row in rows)


def as_csv(rows, delimiter):
    text = io.StringIO(newline="")
    writer = csv.DictWriter(text, list(rows[0]), delimiter=delimiter)
    writer.writeheader()
    writer.writerows(rows)
    return text.getvalue()


def with_zst(content):
    return pyarrow.compress(content, codec="zstd", asbytes=True)


TEXTS = {
    "lines.jsonl": as_lines(ROWS),
    "lines.json": "\n" + as_lines(ROWS).replace("\n", "\r\n\r\n"),
    "escaped.ndjson": "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in ROWS).rstrip(),
    "array.json": json.dumps(ROWS, indent=1),
    "array.jsonl": json.dumps(ROWS),
    "below.json": json.dumps({"version": 1, "data": ROWS}, indent=1),
    "below_in_one_line.json": json.dumps({"data": ROWS}),
    "comma.csv": as_csv(ROWS, ","),
    "semicolon.csv": as_csv(ROWS, ";"),
    "tab.tsv": as_csv(ROWS, "\t"),
}
PACKERS = {"": bytes, ".gz": gzip.compress, ".bz2": bz2.compress, ".xz": lzma.compress}
PACKERS[".zst"] = with_zst


@pytest.mark.parametrize("streaming", [False, True])
@pytest.mark.parametrize("mark", [b"", b"\xef\xbb\xbf"], ids=["", "mark"])
@pytest.mark.parametrize("name", TEXTS)
def test_text_files_are_read_as_they_are_written(name, mark, streaming, tmp_path):
    for suffix, pack in PACKERS.items():
        file = tmp_path / (name + suffix)
        file.write_bytes(pack(mark + TEXTS[name].encode()))
        rows = read_rows(str(file), streaming=streaming)
        assert list(rows) == ROWS
        assert list(rows) == ROWS  # each pass reads anew
        assert list(read_rows(str(file), limit=2, streaming=streaming)) == ROWS[:2]


@pytest.mark.parametrize("suffix", [".gz", ".bz2", ".xz", ".zst"])
def test_compressed_files_put_one_after_another_are_read_to_the_end(suffix, tmp_path):
    parts = [PACKERS[suffix](as_lines(rows).encode()) for rows in (ROWS[:2], ROWS[2:])]
    (tmp_path / f"a.jsonl{suffix}").write_bytes(b"".join(parts))
    assert read_rows(str(tmp_path / f"a.jsonl{suffix}")) == ROWS


def test_tables_from_spreadsheets_are_read(tmp_path):
    cells = 'Question\tAnswer\r\nWhere?\t"There,\r\nover there"\r\n'
    (tmp_path / "a.tsv").write_bytes(cells.encode("utf-16"))
    rows = [{"Question": "Where?", "Answer": "There,\r\nover there"}]
    assert read_rows(str(tmp_path / "a.tsv"), encoding="utf-16") == rows
    (tmp_path / "a.csv").write_bytes(b"prompt;completion\r\n\r\ncaf\xe9?;\r\n")
    assert read_rows(str(tmp_path / "a.csv"), encoding="cp1252") == [
        {"prompt": "café?", "completion": ""}
    ]


def test_a_carriage_return_without_quotes_ends_no_row(tmp_path):
    """As pandas writes it where Python's own csv module puts quotes around line feeds alone."""
    file, rows = tmp_path / "a.csv", [{"a": "1\r2"}, {"a": "3"}, {"a": "\r4\r\r5"}, {"a": "6\n7"}]
    content = b'a\n1\r2\n3\n\r4\r\r5\n"6\n7"\n'
    for begin in (b"", b"sep=;\r\n", b"\r\n"):
        file.write_bytes(begin + content)
        found = read_rows(str(file), on_error="skip")
        assert [type(row) for row in found] == [Unreadable, dict, Unreadable, dict]
        assert found[1::2] == rows[1::2]
        line = 3 if begin else 2
        assert f"a.csv, line {line}: has a carriage return in a cell without" in found[0].reason
    with pytest.raises(ValueError, match=r"a cell with '\\r' in it needs quotes .*QUOTE_ALL"):
        read_rows(str(file))
    datasets.Dataset.from_list(rows).to_csv(file, quoting=csv.QUOTE_ALL)
    assert read_rows(str(file)) == rows
    file.write_bytes(b'a,b\r1,2\r\r"3\n4\r5",6\r')  # of an old Mac
    assert read_rows(str(file)) == [{"a": "1", "b": "2"}, {"a": "3\n4\r5", "b": "6"}]


def test_one_object_over_many_lines_is_one_row(tmp_path):
    file = tmp_path / "one.json"
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}, indent=2))
    assert read_rows(str(file)) == [{"messages": [{"role": "user", "content": "a"}]}]
    file.write_text(json.dumps({"messages": [{"role": "user", "content": "a"}]}))
    assert len(read_rows(str(file))) == 1


def test_text_has_a_row_for_each_line_that_holds_something(tmp_path):
    file = tmp_path / "plain.txt"
    file.write_bytes("One.\r\n\r\n  \nTwo, é.\n".encode())
    assert read_rows(str(file)) == [{"text": "One."}, {"text": "Two, é."}]
    file.write_text("One.\nTwo, é.", encoding="utf-16")
    assert read_rows(str(file), encoding="utf-16")[1] == {"text": "Two, é."}
    with pytest.raises(ValueError, match=r"plain.txt, line 1: not utf-8 .*--encoding utf-16"):
        read_rows(str(file))


def test_a_column_that_first_comes_late_is_no_error(tmp_path):
    file = tmp_path / "late.jsonl"
    rows = [{"prompt": "a", "completion": "b"}] * 5 + [{"prompt": ["x"], "system": "s"}]
    file.write_text(as_lines(rows))
    assert read_rows(str(file)) == rows


@pytest.mark.parametrize("streaming", [False, True])
def test_parquet_and_arrow_are_read(tmp_path, streaming):
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "rows.parquet")
    table.save_to_disk(tmp_path / "saved")
    shard = next((tmp_path / "saved").glob("*.arrow"))
    for source in (tmp_path / "rows.parquet", tmp_path / "saved", shard):
        rows = read_rows(str(source), streaming=streaming)
        assert list(rows) == ROWS
        assert list(read_rows(str(source), limit=4, streaming=streaming)) == ROWS[:4]


def test_nulls_that_arrow_adds_are_left_out(tmp_path):
    tools = [[{"name": "a", "has": {"x": "1"}}], [{"name": "b", "has": {"y": "2"}}]]
    text = datasets.Value("string")
    features = datasets.Features({"tools": [{"name": text, "has": {"x": text, "y": text}}]})
    empty = {"x": None, "y": None}
    filled = [{"tools": [{**tool, "has": empty | tool["has"]} for tool in row]} for row in tools]
    datasets.Dataset.from_list(filled, features=features).to_parquet(tmp_path / "t.parquet")
    assert [row["tools"] for row in read_rows(str(tmp_path / "t.parquet"))] == tools


@pytest.mark.skipif(not hasattr(datasets, "Json"), reason="this version keeps no JSON text")
def test_nulls_of_what_is_kept_as_json_are_those_of_the_data(tmp_path):
    rows = [
        {"chat": [{"role": "assistant", "calls": [{"x": 1}]}]},
        {"chat": [{"role": "assistant", "calls": [{"x": "a", "y": None}]}]},
        {"chat": [{"role": "tool", "calls": None}]},
    ]
    table = datasets.Dataset.from_list(rows, on_mixed_types="use_json")
    assert "Json(" in repr(table.features)
    table.to_parquet(tmp_path / "t.parquet")
    table.save_to_disk(tmp_path / "saved")
    for name in ("t.parquet", "saved"):
        back = list(read_rows(str(tmp_path / name)))
        assert back == [*rows[:2], {"chat": [{"role": "tool"}]}]
    assert next(iter(read_rows(str(tmp_path / "t.parquet"), streaming=True))) == rows[0]


@pytest.mark.parametrize(
    "form", [{"type": "torch", "columns": ["id"]}, {"type": "pandas"}, {"columns": ["prompt"]}]
)
def test_a_saved_format_hides_nothing(form, tmp_path):
    table = datasets.Dataset.from_list([{"prompt": "a", "completion": "b", "id": 1}])
    table.with_format(**form).save_to_disk(tmp_path / "saved")
    assert list(read_rows(str(tmp_path / "saved"))) == table.to_list()


def test_saved_data_sets_have_splits(tmp_path):
    splits = {
        "train": datasets.Dataset.from_list(ROWS),
        "test": datasets.Dataset.from_list(ROWS[:1]),
    }
    datasets.DatasetDict(splits).save_to_disk(tmp_path / "saved")
    assert len(read_rows(str(tmp_path / "saved"), split="test")) == 1
    with pytest.raises(ValueError, match="has no split 'dev'; there are train, test"):
        read_rows(str(tmp_path / "saved"), split="dev")
    with pytest.raises(ValueError, match=r"split='test' goes with data sets that have splits; .*"):
        read_rows(str(tmp_path / "saved" / "train"), split="test")


def test_folders_and_patterns_are_read_shard_by_shard(tmp_path):
    for number, row in enumerate(ROWS):
        (tmp_path / f"part-{number}.jsonl.gz").write_bytes(gzip.compress(as_lines([row]).encode()))
    (tmp_path / "README.md").write_text("# data")
    assert list(read_rows(str(tmp_path))) == ROWS
    assert list(read_rows(str(tmp_path / "part-[12].*"))) == ROWS[1:3]
    assert list(read_rows(str(tmp_path / "**" / "*.gz"), limit=5)) == ROWS[:5]


def test_notes_beside_the_shards_of_a_folder_are_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for number, row in enumerate(ROWS):
        shard = tmp_path / f"part{number}" / "rows.jsonl"
        shard.parent.mkdir()
        shard.write_text(as_lines([row]))
    for name in ("LICENSE.txt", "readme.txt", "meta.json", "part0/info.json"):
        (tmp_path / name).write_text(json.dumps({"version": 1, "files": ["a"]}, indent=1))
    assert list(read_rows(str(tmp_path))) == ROWS
    assert "left out as notes: LICENSE.txt, meta.json, info.json, readme.txt" in caplog.text
    rows = tmp_path / "rows"
    rows.mkdir()
    for number, row in enumerate(ROWS):  # a row in each file, and no other
        (rows / f"{number}.json").write_text(json.dumps(row, indent=1))
    assert list(read_rows(str(rows))) == ROWS
    (rows / "more.json").write_text(json.dumps({"data": ROWS}))
    (rows / "README.txt").write_text("rows")
    for number in range(len(ROWS)):
        (rows / f"{number}.json").unlink()
    assert list(read_rows(str(rows))) == ROWS


@pytest.mark.parametrize("folder", ["run[1]", "all [of] it", "a*b"])
def test_brackets_in_the_names_of_folders_stand_for_themselves(folder, tmp_path):
    (tmp_path / folder).mkdir()
    for name in ("x1.jsonl", "x2.jsonl", "y.jsonl"):
        (tmp_path / folder / name).write_text(as_lines(ROWS[:2]))
    assert len(read_rows(str(tmp_path / folder))) == 6
    assert len(read_rows(str(tmp_path / folder / "x[12].jsonl"))) == 4
    assert len(read_rows(str(tmp_path / folder / "y.jsonl"))) == 2


def test_splits_are_told_by_the_names_of_files(tmp_path):
    (tmp_path / "data").mkdir()
    (tmp_path / "data" / "train-0.csv").write_text(as_csv(ROWS[:3], ","))
    (tmp_path / "data" / "train-1.csv").write_text(as_csv(ROWS[3:], ","))
    (tmp_path / "data" / "test-0.csv").write_text(as_csv(ROWS[:1], ","))
    assert list(read_rows(str(tmp_path))) == ROWS
    assert list(read_rows(str(tmp_path), split="test")) == ROWS[:1]
    with pytest.raises(ValueError, match="has no split 'dev'; there are train, test"):
        read_rows(str(tmp_path), split="dev")


def test_files_without_a_split_beside_those_of_splits_are_left_out_and_said(tmp_path, caplog):
    caplog.set_level("INFO")
    for name in ("train.jsonl", "test.jsonl", "more.jsonl", "README.txt"):
        (tmp_path / name).write_text(as_lines(ROWS[:2]))
    assert list(read_rows(str(tmp_path))) == ROWS[:2]
    assert "left out, as their names tell no split and those of other files do: more.jsonl;" in (
        caplog.text
    )
    assert f"such as {tmp_path}/*.jsonl" in caplog.text
    (tmp_path / "more.jsonl").unlink()
    caplog.clear()
    read_rows(str(tmp_path))
    assert "tell no split" not in caplog.text


def test_options_that_would_be_ignored_are_refused(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text(as_lines(ROWS))
    with pytest.raises(ValueError, match="split='test' goes with folders and hub data sets"):
        read_rows(str(file), split="test")
    with pytest.raises(ValueError, match="configuration goes with data sets on the hub"):
        read_rows(str(file), configuration="main")
    with pytest.raises(ValueError, match="encoding must be one that Python knows, got 'utf-9'"):
        read_rows(str(file), encoding="utf-9")
    with pytest.raises(ValueError, match="revision goes with data sets on the hub"):
        read_rows(str(tmp_path), revision="v1")
    table = datasets.Dataset.from_list(ROWS)
    table.to_parquet(tmp_path / "a.parquet")
    table.save_to_disk(tmp_path / "saved")
    for source in (tmp_path / "a.parquet", tmp_path / "saved", "hf://datasets/owner/name"):
        with pytest.raises(ValueError, match="encoding='cp1252' goes with JSON, CSV and text"):
            read_rows(str(source), encoding="cp1252")


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        (
            "a.jsonl",
            b'{"a": 1}\n\n{"a"\n',
            "a.jsonl, line 3: not JSON .Expecting ':' delimiter, column",
        ),
        ("a.jsonl", b'{"a": 1}\n[1]\n', "a.jsonl, line 2: should be a JSON object, is list"),
        ("a.json", b'\n[{"a": 1},\n{"a" 2}]', "a.json, line 3: not JSON"),
        ("a.json", b'[{"a": 1},\n{"a": 2},\n]', "line 3: not JSON .a comma stands before the clos"),
        ("a.json", b'[{"a": 1}\n\n{"a": 2}]', "a.json, line 3: not JSON .a comma is missing"),
        ("a.json", b'[{"a": 1},\n{"a": 2}', "a.json, line 2: not JSON .a comma is missing"),
        ("a.json", b'[{"a": 1},\n', "a.json, line 2: not JSON .Expecting value"),
        ("a.json", b'[{"a": 1}]\n\n[]', "a.json, line 3: not JSON .something follows"),
        ("a.json", b'[{"a": "caf\xe9"}]', "a.json, line 1: not utf-8"),
        ("a.json", '[{"a": 1}]'.encode("utf-16-le"), r"a.json, line 1: .*--encoding utf-16-le"),
        ("a.csv", "a,b\n1,2".encode("utf-16-be"), r"a.csv, line 1: .*--encoding utf-16-be"),
        ("a.txt", "fine words".encode("utf-16-le"), r"a.txt, line 1: .*--encoding utf-16-le"),
        (
            "a.json",
            b'[{"a": 1},\n 7]',
            r"a.json, item 1 \(counted from 0\): should be a JSON object",
        ),
        ("a.json", b'{"a": 1,\n', "a.json, line 1: not JSON"),
        (
            "a.jsonl",
            b'{"a": "x"}\n{"a": "caf\xe9"}\n',
            "a.jsonl, line 2: not utf-8 .byte 0xe9",
        ),
        ("a.csv", b"a,b\n1,2\n3,caf\xe9\n", "a.csv, line 3: not utf-8"),
        ("a.csv", b'a,b\n"1\n1",2\n3\n', "a.csv, line 4: has 1 cells, where the header has 2"),
        ("a.csv", b'a,b\n1,2\n"3,4\n5,6\n', "a.csv, line 3: not CSV"),
        ("a.csv", b"a,b,a\n1,2,3\n", "a.csv, line 1: the header has 'a' more than once"),
        (
            "a.jsonl",
            b'{"a": "\\ud83d\\ude00"}\n{"a": "\\ud83d"}',
            "line 2: holds one half",
        ),
        ("a.txt", b"fine\ncaf\xe9\n", "a.txt, line 2: not utf-8"),
        ("a.jsonl", gzip.compress(b"{}", mtime=0), r"is compressed; name it a.jsonl.gz"),
        ("a.jsonl.gz", b"no gzip", "a.jsonl.gz can't be read to its end"),
        (
            "a.jsonl.gz",
            gzip.compress(as_lines(ROWS).encode(), mtime=0)[:-20],
            "can't be read to its end",
        ),
        ("a.jsonl.zst", b"no zstd", "a.jsonl.zst can't be read to its end"),
        ("a.parquet", b"no parquet", "a.parquet can't be read"),
        ("a.csv", b"a,b\n", "a.csv holds no rows"),
        ("a.json", b"[]", "a.json"),
        ("a.xlsx", b"", "a.xlsx is of no kind that is read; there are .json, .jsonl"),
        ("a", b"", "a is of no kind that is read"),
    ],
)
def test_errors_name_the_file_and_the_line(name, content, message, tmp_path):
    (tmp_path / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        read_rows(str(tmp_path / name))


def test_errors_of_a_later_shard_name_it(tmp_path):
    (tmp_path / "a.jsonl").write_text(as_lines(ROWS))
    (tmp_path / "b.jsonl").write_text(as_lines(ROWS) + "{\n")
    with pytest.raises(ValueError, match=r"b.jsonl, line 7: not JSON"):
        read_rows(str(tmp_path))
    (tmp_path / "b.jsonl").rename(tmp_path / "b.csv")
    with pytest.raises(ValueError, match=r"holds files of several kinds"):
        read_rows(str(tmp_path))


def test_arrays_are_read_item_by_item(tmp_path):
    rows = [{"a": "[{,}] \\" * size, "b": [None, {"c": size / 7}]} for size in (0, 9, 50_000, 3)]
    for number, indent in enumerate((None, 1)):
        content = json.dumps(rows, indent=indent)
        text = io.StringIO(content)
        assert [row for row, _ in read_array(begin_of(text), text)] == rows
        (tmp_path / f"{number}.json").write_text(f" \n{content} \n")
        assert read_rows(str(tmp_path / f"{number}.json")) == rows
    broken = tmp_path / "broken.json"
    broken.write_text(json.dumps(rows)[:-1] + "," + " " * 300_000 + "broken")
    stream = iter(read_rows(str(broken), streaming=True))
    assert [next(stream) for _ in rows] == rows  # what follows is not read before
    with pytest.raises(ValueError, match=r"broken.json, line 1: not JSON"):
        next(stream)
    long = io.StringIO("[" + json.dumps(rows[1]) + "," * 1_000_000)
    assert next(read_array(begin_of(long), long))[0] == rows[1]
    assert long.tell() < 200_000


def test_lines_that_are_no_rows_keep_their_places(tmp_path):
    file = tmp_path / "a.jsonl"
    file.write_text('{"a": 1}\nnothing\n{"a": 3}\n')
    rows = read_rows(str(file), on_error="skip")
    assert [type(row) for row in rows] == [dict, Unreadable, dict]
    assert "a.jsonl, line 2: not JSON" in rows[1].reason
    for name, content in (
        ("b.jsonl", b'{"a": 1}\n{"a": "\xe9"}\n{}\n'),
        ("b.csv", b"a\n1\n\xe9\n3\n"),
    ):
        (tmp_path / name).write_bytes(content)
        rows = read_rows(str(tmp_path / name), on_error="skip")
        assert [type(row) for row in rows] == [dict, Unreadable, dict]
        assert f"{name}, row 1: holds bytes that are no text" in rows[1].reason


@pytest.mark.parametrize(
    "source",
    [
        *("data.jsonl", "gsm8k", "./data", "../x/y", "here/data", "a/b/c", "here/x.csv", "~/x"),
        *("heer/train", "her/trian"),  # nearly here/train.jsonl
    ],
)
def test_local_names_that_are_not_there_are_not_sent_to_the_hub(source, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "train.jsonl").write_text("{}")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(datasets, "load_dataset", lambda *a, **k: pytest.fail("asked the hub"))
    assert hub_id(source) is None
    with pytest.raises(FileNotFoundError, match="there is no file"):
        read_rows(source)


def test_close_names_are_said(tmp_path):
    (tmp_path / "train.jsonl").write_text(as_lines(ROWS))
    with pytest.raises(FileNotFoundError, match=r"there is .*/train.jsonl"):
        read_rows(str(tmp_path / "trian.jsonl"))
    with pytest.raises(FileNotFoundError, match="no file matches"):
        read_rows(str(tmp_path / "*.csv"))


def test_the_hub_gets_configuration_and_revision(monkeypatch):
    calls = []

    def load(*arguments, **options):
        calls.append((arguments, options))
        return datasets.Dataset.from_list(ROWS)

    monkeypatch.setattr(datasets, "load_dataset", load)
    rows = read_rows("openai/gsm8k", configuration="main", revision="v1", split="test", limit=2)
    assert list(rows) == ROWS[:2]
    options = {"split": "test", "revision": "v1", "streaming": False}
    assert calls == [(("openai/gsm8k", "main"), options)]
    assert list(read_rows("hf://datasets/openai/gsm8k")) == ROWS


def test_what_the_hub_says_is_told_in_one_line(monkeypatch):
    def load(*arguments, **options):
        raise ValueError("Config name is missing.\nPlease pick one among: ['main', 'socratic']")

    monkeypatch.setattr(datasets, "load_dataset", load)
    with pytest.raises(ValueError, match=r"pick one among: .*'socratic'") as caught:
        read_rows("openai/gsm8k")
    assert "\n" not in str(caught.value)
