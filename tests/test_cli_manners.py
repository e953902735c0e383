"""What the command line says, and when: sizes, times, caches, flags, files of options, shells."""

import argparse
import gzip
import html
import json
import math
import os
import shutil
import subprocess
import sys
from importlib.metadata import PackageNotFoundError
from pathlib import Path

import pytest
import torch

import flowdata.cli.commands.score as score_command
from flowdata import Scores
from flowdata.cli.main import main
from flowdata.cli.output import print_result
from flowdata.cli.parser import make_parser, parse_options
from flowdata.cli.shell import wording
from flowdata.cli.shell.completion import completion_script
from flowdata.cli.shell.wording import flags_of, in_flags
from flowdata.text import read_rows, tokenize_rows
from tests.models import tiny_llama
from tests.test_cli import data, model_folder, run, without_warning
from tests.test_text import tokenizer

__all__ = ["data", "model_folder", "tokenizer"]  # the fixtures


@pytest.fixture
def loads(monkeypatch):
    """The models that were loaded."""
    models = []
    load = score_command.load_model

    def counting(source, **options):
        models.append(source)
        return load(source, **options)

    monkeypatch.setattr(score_command, "load_model", counting)
    return models


def test_the_size_is_said_before_the_run_and_in_order(capsys, model_folder, data, tmp_path):
    score = ("score", model_folder, data, "--store", tmp_path / "s", "--dtype", "float32")
    _, _, err = run(capsys, *score)
    targets = int(Scores.load(tmp_path / "s").counts.sum())
    size = f"in all: samples 30, tokens 885, targets {targets}"
    assert "reading: 30 of 30 rows (100%)" in err
    assert err.count("scoring: 885 of 885 tokens (100%)") == 1
    assert err.index("format: question and answer") < err.index(size) < err.index("causal_lm in")


@pytest.mark.parametrize("flag", ["--quiet", None])
def test_a_cached_run_says_so_and_loads_no_model(capsys, model_folder, data, tmp_path, loads, flag):
    score = (
        "score",
        model_folder,
        data,
        "--store",
        tmp_path / "s",
        "--json",
        *filter(None, [flag]),
    )
    first = run(capsys, *score)
    second = run(capsys, *score)
    assert first[:2] == second[:2]
    assert loads == [model_folder]
    said = f"losses of 30 samples found in {tmp_path / 's'}; the model is not loaded"
    assert (said in second[2]) == (flag is None)
    if flag:
        assert without_warning(second[2]) == ""


@pytest.mark.parametrize(
    "option", [("--token-losses",), ("--columns", "entropy"), ("--dtype", "bfloat16")]
)
def test_a_store_of_other_options_is_no_cache(capsys, model_folder, data, tmp_path, loads, option):
    score = ("score", model_folder, data, "--store", tmp_path / "s", "--dtype", "float32")
    assert run(capsys, *score)[0] == 0
    code, _, err = run(capsys, *score, *option)
    assert (code, len(loads)) == (2, 2)
    assert "was made with another" in err


def test_a_changed_model_of_the_same_size_and_time_is_no_cache(
    capsys, model_folder, data, tmp_path, loads
):
    model = tmp_path / "model"
    shutil.copytree(model_folder, model)
    score = ("score", model, data, "--store", tmp_path / "s", "--dtype", "float32")
    assert run(capsys, *score)[0] == 0
    file = model / "model.safetensors"
    before = file.stat()
    content = bytearray(file.read_bytes())
    content[-3] ^= 64
    file.write_bytes(content)
    os.utime(file, ns=(before.st_atime_ns, before.st_mtime_ns))  # as a copy that keeps times does
    code, _, err = run(capsys, *score)
    assert (code, len(loads)) == (2, 2)
    assert "was made with another model" in err


def test_a_damaged_store_is_no_cache(capsys, model_folder, data, tmp_path, loads):
    score = ("score", model_folder, data, "--store", tmp_path / "s", "--dtype", "float32")
    run(capsys, *score)
    losses = Scores.load(tmp_path / "s").losses
    file = tmp_path / "s" / "scores.safetensors"
    content = bytearray(file.read_bytes())
    content[-1] ^= 1
    file.write_bytes(content)
    assert run(capsys, *score)[0] == 0
    assert len(loads) == 2
    assert torch.equal(Scores.load(tmp_path / "s").losses, losses)


def test_messages_speak_of_flags(capsys, model_folder, tmp_path):
    file = tmp_path / "data.jsonl"
    file.write_text('{"prompt": "a", "completion": "b", "system": "c"}\n')
    store = ("--store", tmp_path / "s")
    for options, message in (
        (("--split", "test"), "--split test goes with folders and hub data sets"),
        (("--revision", "main"), "--revision goes with data sets on the hub"),
        (("--encoding", "utf-99"), "--encoding must be one that Python knows, got 'utf-99'"),
        (("--columns", "magic"), "--columns must be among"),
        (("--max-tokens", "0"), "--max-tokens must be"),
        (("--template-option", "x=1"), "the chat template has no variable 'x'"),
    ):
        code, out, err = run(capsys, "score", model_folder, file, *store, *options)
        assert (code, out) == (2, "")
        assert message in err.splitlines()[-1]


@pytest.mark.parametrize(
    ("option", "value"), [("--max-tokens", "0"), ("--columns", "magic"), ("--temperature", "-1")]
)
def test_options_are_refused_before_data_is_read(option, value, capsys, model_folder, tmp_path):
    store = ("--store", tmp_path / "s")
    code, _, err = run(capsys, "score", model_folder, "no-data", *store, option, value)
    assert code == 2
    assert err.startswith(f"flowdata score: {option}")


@pytest.mark.parametrize("command", ["score", "drift", "front"])
def test_a_precision_that_there_is_not_is_refused_before_anything_is_read(command, capsys):
    with pytest.raises(SystemExit) as stop:
        run(capsys, command, "no-model", "no-data", "--dtype", "fp32")
    assert stop.value.code == 2
    assert "--dtype: invalid choice: 'fp32' (choose from " in capsys.readouterr().err


@pytest.mark.parametrize(
    ("message", "expected"),
    [
        ("pass on_error='skip' to", "pass --on-error skip to"),
        ("template=False or template=True", "--no-template or --template"),
        ("name it (system='my text')", "name it (--system-column 'my text')"),
        ("an empty one (tools='')", "an empty one (--tools-column '')"),
        ("template_options has no effect", "--template-option has no effect"),
        ("weights(missing='zero')", "weights(missing='zero')"),  # no flag of this command
        ("row 3 says \"limit='x'\"", "row 3 says \"limit='x'\""),
        ("data_limit=3", "data_limit=3"),
        (
            "sample 3. weights(missing='zero') gives them weight 0",
            "sample 3. flowdata weigh gives them null for a weight, and leaves them out with "
            "--missing drop",
        ),
        ("score with LossScorer(..., token_losses=True)", "score with --token-losses"),
        ("delete this one if its losses are", "pass --overwrite if its losses are"),
        ("such as 'ess0.5', or a callable losses -> float; got", "such as 'ess0.5'; got"),
    ],
)
def test_arguments_of_python_become_flags(message, expected):
    assert in_flags(message, flags_of(make_parser(), "score")) == expected


def test_what_is_missing_is_named_with_one_command(monkeypatch):
    message = 'this needs transformers: pip install "flowdata-torch[transformers]"'
    lines = [
        "torch>=2.10",
        'peft>=0.18; extra == "peft"',
        'flowdata-torch[transformers]; extra == "peft"',
        'transformers>=5.19; extra == "transformers"',
        "trl>=1.15; python_version >= '3.11' and extra == 'test'",
    ]
    monkeypatch.setattr(wording, "requires", lambda name: lines)
    pip = f"{sys.executable} -m pip install "
    assert in_flags(message, {}) == f"this needs transformers: {pip}'transformers>=5.19'"
    of_peft = in_flags('PEFT: pip install "flowdata-torch[peft]"', {})
    assert of_peft == f"PEFT: {pip}'peft>=0.18' 'transformers>=5.19'"

    def missing(name):
        raise PackageNotFoundError

    monkeypatch.setattr(wording, "requires", missing)
    folder = Path(wording.__file__).parents[3]
    assert (folder / "pyproject.toml").exists()
    assert in_flags(message, {}).endswith(f"{pip}'{folder}[transformers]'")


@pytest.mark.skipif(sys.version_info < (3, 11), reason="Python reads TOML from 3.11 on")
def test_options_come_from_a_file_and_flags_win(capsys, model_folder, data, tmp_path):
    config = tmp_path / "run.toml"
    config.write_text(
        f"model = '{model_folder}'\ndata = '{data}'\nstore = '{tmp_path / 's'}'\n"
        "limit = 5\njson = true\ndtype = 'float32'\ntoken-losses = true\n"
        "columns = ['entropy', 'correct']\ntemplate = true\n"
    )
    code, out, err = run(capsys, "score", "--config", config)
    assert code == 0, err
    assert json.loads(out)["samples"] == 5
    scores = Scores.load(tmp_path / "s")
    assert set(scores.columns) == {"entropy", "correct"}
    assert scores.flat_token_losses is not None
    code, out, _ = run(capsys, "score", "--config", config, "--limit", 7)
    assert (code, json.loads(out)["samples"]) == (0, 7)


def test_a_file_of_yaml_with_arguments_beside_it(capsys, model_folder, data, tmp_path):
    config = tmp_path / "run.yaml"
    config.write_text(f"model: {model_folder}\nmax_length: 20\ntruncation: keep_end\nlimit:\n")
    code, out, _ = run(
        capsys, "score", "--config", config, data, "--store", tmp_path / "s", "--json"
    )
    assert code == 0
    assert json.loads(out)["num_cut"] == 30
    config.write_text("{}\n")
    with pytest.raises(SystemExit, match="2"):
        main(["score", "--config", str(config)])
    assert "the following arguments are required: model, data" in capsys.readouterr().err


def test_json_has_null_for_what_is_no_number(capsys):
    facts = {"kl": math.inf, "front": [{"cost": math.nan}, (1.5, -math.inf)], "n": 3, "is": True}
    print_result(argparse.Namespace(json=True), facts, "")
    assert capsys.readouterr().out == (
        '{"kl": null, "front": [{"cost": null}, [1.5, null]], "n": 3, "is": true}\n'
    )


def test_a_file_of_options_is_never_left_out(capsys, tmp_path):
    file = tmp_path / "run.yaml"
    file.write_text("top: 3\n")
    assert parse_options(["report", "s", "--config", str(file)])[0].top == 3
    with pytest.raises(SystemExit, match="2"):
        parse_options(["report", "s", "--conf", str(file)])
    assert f"unrecognized arguments: --conf {file}" in capsys.readouterr().err
    with pytest.raises(SystemExit, match="2"):
        parse_options(["report", "s", "--config", str(file), f"--config={file}"])
    assert f"--config takes one file, got {file} and {file}" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("words", "base", "tuned"),
    [
        ("drift B --config FILE", "B", ["F"]),
        ("drift --config FILE B --quiet X", "B", ["X"]),
        ("drift B X --config FILE Y", "B", ["X", "Y"]),
        ("drift --quiet --config FILE", "A", ["F"]),
    ],
)
def test_arguments_by_their_place_win_wherever_they_stand(tmp_path, words, base, tuned):
    file = tmp_path / "run.yaml"
    file.write_text("base: A\ntuned: [F]\n")
    options, flags = parse_options(words.replace("FILE", str(file)).split())
    assert (options.command, options.base, options.tuned) == ("drift", base, tuned)
    assert callable(options.run)
    assert "samples" in flags
    assert options.quiet == ("--quiet" in words)


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.yaml", "limt: 3\n", "has 'limt', which is no option; the closest is 'limit'"),
        ("a.yaml", "max-lenght: 3\n", "the closest is 'max-length'"),
        ("a.yaml", "zzz: 3\n", "which is no option; there are "),
        ("a.yaml", "limit: many\n", "limit = 'many' is not what it takes"),
        ("a.yaml", "limit: true\n", "one value, not a bool"),
        ("a.yaml", "json: 1\n", "it is a switch, true or false"),
        ("a.yaml", "truncation: middle\n", "it is one of keep_start, keep_end"),
        ("a.yaml", "- model\n", "should hold options, one a line"),
        ("a.yaml", "model: [\n", "is no YAML"),
        ("a.json", "{}", "--config takes a file that ends in .toml, .yaml, .yml"),
        ("none.yaml", None, "No such file"),
    ],
)
def test_a_file_of_options_that_is_none_is_refused(capsys, tmp_path, name, content, message):
    if content is not None:
        (tmp_path / name).write_text(content)
    with pytest.raises(SystemExit, match="2"):
        main(["score", "--config", str(tmp_path / name)])
    assert message in capsys.readouterr().err


@pytest.mark.skipif(shutil.which("bash") is None, reason="needs bash")
def test_the_shell_completes_commands_flags_and_choices(capsys):
    with pytest.raises(SystemExit, match="0"):
        main(["--print-completion", "bash"])
    printed = capsys.readouterr().out

    def completed(*words):
        line = " ".join(f"'{word}'" for word in words)
        script = (
            f"{printed}\nCOMP_WORDS=({line}); COMP_CWORD={len(words) - 1}; _flowdata; "
            'printf "%s\\n" "${COMPREPLY[@]}"'
        )
        run = subprocess.run(["bash", "-c", script], capture_output=True, text=True, check=True)
        return run.stdout.split()

    assert completed("flowdata", "sc") == ["score"]
    assert completed("flowdata", "score", "--trunc") == ["--truncation"]
    assert completed("flowdata", "score", "--truncation", "") == ["keep_start", "keep_end"]
    assert completed("flowdata", "score", "da") == []  # names of files are the shell's own


def test_every_shell_has_a_script(capsys):
    for shell in ("bash", "zsh"):
        with pytest.raises(SystemExit, match="0"):
            main(["--print-completion", shell])
        script = capsys.readouterr().out
        assert ("bashcompinit" in script) == (shell == "zsh")
        assert "complete -o default -F _flowdata flowdata" in script
    assert completion_script({}).startswith("_flowdata()")


def test_a_row_that_needs_a_template_names_remedies_that_help(capsys, tmp_path, tokenizer):
    bare = tmp_path / "bare"
    tiny_llama().save_pretrained(bare)
    template, tokenizer.chat_template = tokenizer.chat_template, None
    try:
        tokenizer.save_pretrained(bare)
    finally:
        tokenizer.chat_template = template
    pair = {"prompt": "a", "completion": "b"}
    chat = {"messages": [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]}
    file = tmp_path / "data.jsonl"
    store = ("--store", tmp_path / "s")
    for row, options in (
        ({**pair, "system": "c"}, ("--system-column", "")),
        ({**pair, "history": [["a", "b"]]}, ("--history-column", "")),
        ({**pair, "system": "c", "tools": [{"name": "f"}]}, ("--system-column", "")),
        (chat, None),
    ):
        file.write_text(json.dumps(pair if row is not chat else row) + "\n" + json.dumps(row))
        code, _, err = run(capsys, "score", bare, file, *store, "--overwrite")
        assert code == 2
        assert "--no-template" not in err
        assert "has no chat template: name one (--chat-template FILE)" in err
        if options is None:
            assert "-column" not in err
            continue
        assert f"{options[0]} ''" in err
        more = ("--tools-column", "") if "tools" in row else ()
        assert run(capsys, "score", bare, file, *store, "--overwrite", *options, *more)[0] == 0


@pytest.mark.parametrize("name", ["Input", "CONTEXT", "System_Prompt", "Tools", "Image"])
def test_a_column_in_another_case_that_comes_late_is_not_dropped(tokenizer, name):
    pair = {"instruction": "a", "output": "b"}
    empty = tokenize_rows([pair, {**pair, name: ""}], tokenizer, template=True)
    assert len(empty) == 2
    with pytest.raises(ValueError, match=f"row 1: column '{name}' holds something"):
        tokenize_rows([pair, {**pair, name: "c"}], tokenizer, template=True)


@pytest.mark.parametrize("tag", ["<image>", "<img>a.png</img>", "<|vision_start|>", "<audio>"])
def test_tags_of_images_in_text_are_said(caplog, tokenizer, tag):
    rows = [{"prompt": "a", "completion": "b"}, {"prompt": f"{tag} what", "completion": "c"}]
    tokenize_rows(rows, tokenizer, template=False)
    assert "tags of images, sound or video are in the text of rows, of 1 in all" in caplog.text
    assert "in row 1: they are scored as text" in caplog.text
    caplog.clear()
    html = [{"prompt": "a", "completion": '<img src="a.png"> is a tag of HTML; <imagine> none'}]
    tokenize_rows(html, tokenizer, template=False)
    assert "tags" not in caplog.text


def test_text_and_chats_in_one_data_set_are_said(caplog, tokenizer):
    rows = [{"prompt": "a", "completion": "b", "system": system} for system in ("", "c", None)]
    tokenize_rows(rows, tokenizer, template=False)
    assert "bare text, of which there are 2, and the first is row 0, and others go" in caplog.text
    caplog.clear()
    tokenize_rows(rows, tokenizer, template=True)
    tokenize_rows(rows[::2], tokenizer, template=False)
    assert "bare text" not in caplog.text


def test_an_object_that_was_to_be_streamed_is_said_to_be_read_whole(caplog, tmp_path):
    caplog.set_level("INFO")
    rows = [{"prompt": "a" * 1000, "completion": "b"}] * 1100
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    for name, content, is_object in (
        ("a.json", json.dumps(rows), False),
        ("b.json", json.dumps({"data": rows}), True),
        ("c.jsonl", lines, False),
        ("d.json", json.dumps({"data": rows[:2]}), False),  # small
    ):
        caplog.clear()
        (tmp_path / name).write_text(content)
        assert next(iter(read_rows(str(tmp_path / name), streaming=True))) == rows[0]
        assert (f"{name} is one JSON object, which is read whole" in caplog.text) == is_object
        caplog.clear()
        read_rows(str(tmp_path / name))
        assert caplog.text == ""


HONEY = [{"prompt": "What do bees make?", "completion": "Honey; a lot"}]


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("sheet.csv", b'\xef\xbb\xbfprompt;completion\r\nWhat do bees make?;"Honey; a lot"\r\n'),
        ("excel.csv", b'sep=;\r\nprompt;completion\r\nWhat do bees make?;"Honey; a lot"\r\n'),
        ("bar.csv", b"sep=|\nprompt|completion\nWhat do bees make?|Honey; a lot\n"),
        ("windows.jsonl", json.dumps(HONEY[0]).encode() + b"\r\n"),
        ("held.json", json.dumps({"version": 1, "data": HONEY}, indent=1).encode()),
        ("lines.jsonl.gz", gzip.compress(json.dumps(HONEY[0]).encode(), mtime=0)),
    ],
)
def test_files_as_people_have_them_are_scored_from_the_command_line(
    capsys, model_folder, tmp_path, name, content
):
    (tmp_path / name).write_bytes(content)
    code, out, err = run(
        capsys, "score", model_folder, tmp_path / name, "--store", tmp_path / "s", "--json"
    )
    assert code == 0, err
    assert json.loads(out)["targets"] == len("Honey; a lot") + 1  # letters, and the end
    assert "format: prompt and completion" in err


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.xlsx", b"PK", "Save the sheet as CSV"),
        ("a.zip", b"PK", "Unpack it, and name the folder"),
        ("a", b"{}", "Give it the ending of what it holds"),
        ("a.jsonl", b"", "a.jsonl holds no rows"),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": null}\n',
            "it holds null; rows count from 0; --on",
        ),
        (
            "a.jsonl",
            b'{"prompt": "a", "completion": 4}\n',
            "it holds an int; rows count from 0; --on",
        ),
        ("a.jsonl", b'{"prompt": "a",\n', "--on-error skip leaves such rows without a loss"),
        ("a.csv", b"prompt,completion\na,b,c\n", "--on-error skip leaves such rows"),
        ("a.csv", "prompt,completion\na,é\n".encode("cp1252"), "--encoding cp1252"),
    ],
)
def test_a_file_that_is_not_read_says_what_to_do(
    capsys, model_folder, tmp_path, name, content, message
):
    (tmp_path / name).write_bytes(content)
    code, out, err = run(capsys, "score", model_folder, tmp_path / name, "--store", tmp_path / "s")
    assert (code, out) == (2, "")
    assert message in err


def test_a_folder_of_several_kinds_names_a_pattern_that_helps(capsys, model_folder, tmp_path):
    (tmp_path / "a.csv").write_text("prompt,completion\na,b\n")
    (tmp_path / "b.jsonl").write_text(json.dumps(HONEY[0]) + "\n")
    store = ("--store", tmp_path / "s")
    code, _, err = run(capsys, "score", model_folder, tmp_path, *store)
    assert code == 2
    pattern = err.split("a pattern such as ")[1].strip()
    assert run(capsys, "score", model_folder, pattern, *store)[0] == 0


def test_tools_that_the_template_leaves_out_name_the_flag_that_helps(
    capsys, model_folder, tmp_path
):
    tools = [{"type": "function", "function": {"name": "f", "parameters": {}}}]
    chat = [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b"}]
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat, "tools": tools}) + "\n")
    score = ("score", model_folder, tmp_path / "a.jsonl", "--store", tmp_path / "s")
    code, _, err = run(capsys, *score)
    assert code == 2
    assert "read no column of tools (--tools-column '')" in err
    assert run(capsys, *score, "--tools-column", "")[0] == 0
    call = {"type": "function", "function": {"name": "f", "arguments": {"city": "Oslo"}}}
    chat.insert(1, {"role": "assistant", "content": "", "tool_calls": [call]})
    chat.insert(2, {"role": "tool", "content": "4"})
    (tmp_path / "a.jsonl").write_text(json.dumps({"messages": chat, "tools": tools}) + "\n")
    for more in ((), ("--tools-column", "")):
        code, _, err = run(capsys, *score, "--overwrite", *more)
        assert code == 2
        assert f"name a template that writes {'it' if more else 'them'} (--chat-template" in err
        assert "--tools-column" not in err


def test_a_row_that_is_skipped_is_counted_and_reported_with_its_reason(
    capsys, model_folder, tmp_path
):
    (tmp_path / "a.jsonl").write_text(json.dumps(HONEY[0]) + "\n" + '{"prompt": "a"}\n')
    store = ("--store", tmp_path / "s")
    code, out, _ = run(
        capsys, "score", model_folder, tmp_path / "a.jsonl", *store, "--on-error", "skip"
    )
    assert (code, out.splitlines()[0]) == (0, f"1 of 2 samples scored into {tmp_path / 's'}")
    _, out, _ = run(capsys, "report", tmp_path / "s")
    told = out.splitlines()[0]
    assert told.startswith("1 row could not be read: row 1")
    page = (tmp_path / "s" / "report" / "report.html").read_text("utf-8")
    assert f"<b>1</b>{html.escape(told[2:], quote=False)}<button" in page
    assert "one that is blank" not in page


def test_empty_replies_are_said(caplog, tokenizer):
    rows = [{"prompt": "a", "completion": "b"}] + 2 * [{"prompt": "a", "completion": ""}]
    for template in (True, False):
        caplog.clear()
        tokenize_rows(rows, tokenizer, template=template)
        assert "rows of which there are 2, and the first is row 1" in caplog.text
    caplog.clear()
    chat = [{"role": "user", "content": ""}, {"role": "assistant", "content": "b"}]
    tokenize_rows([{"messages": chat}], tokenizer, template=True)
    assert "empty" not in caplog.text
