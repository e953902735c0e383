import json
import subprocess
import sys
from pathlib import Path

import datasets
import pytest
import torch

from flowdata import LossScorer, Scores
from flowdata.cli.commands import COMMANDS
from flowdata.cli.main import main
from tests.models import TinyResNet, tiny_llama
from tests.test_text import tokenizer

__all__ = ["tokenizer"]  # the fixture


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture
def data(tmp_path):
    file = tmp_path / "data.jsonl"
    rows = [{"question": f"{n}+1=", "answer": "x" * (n % 7 + 1)} for n in range(30)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


def without_warning(err):
    """What a command says beside that its model, which is random, does no better than guessing."""
    lines = err.splitlines(keepends=True)
    return "".join(line for line in lines if "no better than a guess" not in line)


def test_quiet_is_quiet(model_folder, data, tmp_path):
    command = [sys.executable, "-m", "flowdata", "score", model_folder, data, "--quiet"]
    done = subprocess.run(
        [*map(str, command), "--store", str(tmp_path / "s")], capture_output=True, text=True
    )
    assert (done.returncode, done.stdout) == (0, "")
    assert without_warning(done.stderr) == ""


def test_how_a_run_is_scored_is_said_once(capsys, model_folder, data, tmp_path):
    command = ("score", model_folder, data, "--store", tmp_path / "s")
    code, out, err = run(capsys, *command)
    assert code == 0
    assert (out + err).count("causal_lm in ") == 1
    assert out.startswith(f"30 samples scored into {tmp_path / 's'}\n")
    assert f"scored into {tmp_path / 's'} (all were there)" in run(capsys, *command)[1]


def test_every_command_is_quiet_on_a_store(capsys, model_folder, data, tmp_path):
    store = tmp_path / "s"
    score = ("score", model_folder, data, "--store", store)
    for command in (
        score,
        score,  # all losses are there
        ("weigh", store, "--output", tmp_path / "weighted.jsonl"),
        ("verify", store),
        ("report", store),
        ("report", store, "--after", store),
    ):
        code, out, err = run(capsys, *command, "--quiet")
        assert (code, out, without_warning(err)) == (0, "", ""), command
        assert err == "" or command is score
    code, out, err = run(capsys, "verify", store, "--quiet", "--json")
    assert (code, json.loads(out)["whole"], err) == (0, True, "")
    code, out, err = run(capsys, *score, "--quiet", "--preview")  # it is asked for to be read
    assert (code, err) == (0, "")
    assert "first sample:" in out
    code, _, err = run(capsys, *score, "--preview", "--limit", 0)
    assert (code, err) == (2, "flowdata score: --limit must be at least 1, got 0\n")


def test_score_report_and_verify(capsys, model_folder, data, tmp_path):
    store = tmp_path / "store"
    score = ("score", model_folder, data, "--store", store, "--dtype", "float32")
    code, out, _ = run(capsys, *score)
    assert code == 0
    assert "30 samples scored into" in out
    assert f"next: flowdata report {store}" in out
    scores = Scores.load(store)
    assert len(scores) == 30
    assert scores.counts.tolist() == [n % 7 + 2 for n in range(30)]

    code, out, err = run(capsys, *score, "--json")
    assert code == 0
    assert json.loads(out)["samples"] == 30
    assert "losses of 30 samples found" in err

    code, out, _ = run(capsys, "report", store)
    verdict, *_, page, picture = out.splitlines()
    assert verdict.startswith("The model does no better than guessing")  # it is random
    assert "samples: " not in out  # `score` has printed the figures
    assert (page, picture) == tuple(
        f"{store}/report/{name}" for name in ("report.html", "losses.png")
    )
    assert json.loads(run(capsys, "report", store, "--json")[1])["verdict"] == verdict
    assert code == 0
    page = (store / "report" / "report.html").read_text()
    assert "+1=" in page  # the samples' own text

    code, out, _ = run(capsys, "verify", store)
    assert (code, out) == (0, "scores.safetensors: whole\nmanifest.json: whole\n")
    file = store / "scores.safetensors"
    file.write_bytes(file.read_bytes()[:-1])
    code, out, _ = run(capsys, "verify", store, "--json")
    assert code == 1
    assert json.loads(out)["whole"] is False
    code, out, _ = run(capsys, "verify", store)
    assert code == 1
    assert out.endswith("the same flowdata score command scores what is damaged or missing\n")


def test_verify_says_of_a_store_made_in_python_that_the_call_mends_it(capsys, tmp_path):
    def remedy():
        return run(capsys, "verify", tmp_path)[1].splitlines()[-1]

    samples = [(torch.randn(3, 8, 8), index % 4) for index in range(8)]
    LossScorer(TinyResNet(), progress=False).score(samples, store=tmp_path)
    (tmp_path / "scores.safetensors").write_bytes(b"")
    assert remedy() == "the same call of LossScorer.score scores what is damaged or missing"
    (tmp_path / "manifest.json").write_bytes(b"")
    assert remedy() == (
        "the same flowdata score command, or the same call of LossScorer.score, scores what is "
        "damaged or missing"
    )


def test_what_a_tuned_model_learned_and_forgot_is_reported(capsys, model_folder, data, tmp_path):
    tuned = tiny_llama()
    with torch.no_grad():
        tuned.lm_head.weight[::2] += 0.05  # some losses fall, others rise
    tuned.save_pretrained(tmp_path / "tuned")
    stores = tmp_path / "before", tmp_path / "after"
    # The tuned model's folder has no tokenizer of its own.
    for model, store in zip((model_folder, tmp_path / "tuned"), stores, strict=True):
        score = ("score", model, data, "--store", store, "--dtype", "float32")
        assert run(capsys, *score, "--tokenizer", model_folder)[0] == 0
    before, after = map(Scores.load, stores)
    report = ("report", stores[0], "--after", stores[1], "--top", 3)
    code, out, _ = run(capsys, *report, "--json")
    assert code == 0
    facts = json.loads(out)
    differences = after.losses - before.losses
    assert facts["learned"] == int((differences < 0).sum())
    assert facts["most_learned"] == differences.argsort()[:3].tolist()
    assert facts["most_forgotten"] == differences.argsort(descending=True)[:3].tolist()
    page = (stores[0] / "report" / "comparison.html").read_text()
    assert facts["page"] == str(stores[0] / "report" / "comparison.html")
    assert page.count("<pre>") == 6
    assert "+1=" in page  # the samples' own text
    code, out, _ = run(capsys, *report, "--output", tmp_path / "page")
    assert f"{tmp_path / 'page' / 'comparison.html'}" in out
    code, _, err = run(capsys, *report, "--temperature", "mean")
    assert code == 2
    assert "--temperature says how losses are weighed; it has no use with --after" in err


def test_further_columns_and_token_losses_are_kept(capsys, model_folder, data, tmp_path):
    score = ("score", model_folder, data, "--store", tmp_path / "store", "--limit", 5)
    code, _, _ = run(capsys, *score, "--token-losses", "--columns", "entropy", "gradient_norm")
    assert code == 0
    scores = Scores.load(tmp_path / "store")
    assert set(scores.columns) == {"entropy", "gradient_norm"}
    assert len(scores.flat_token_losses) == int(scores.counts.sum())
    code, _, err = run(capsys, *score, "--columns", "magic")
    assert code == 2
    assert "columns must be among 'entropy', 'correct', 'gradient_norm', got 'magic'" in err


def test_chats_parquet_limits_and_cuts(capsys, model_folder, tmp_path):
    chats = [
        [{"role": "user", "content": "a"}, {"role": "assistant", "content": "b" * n}]
        for n in (1, 40)
    ]
    file = tmp_path / "chats.parquet"
    datasets.Dataset.from_dict({"messages": [*chats, chats[0]]}).to_parquet(file)
    code, out, err = run(
        capsys,
        "score",
        model_folder,
        file,
        "--store",
        tmp_path / "s",
        "--limit",
        2,
        "--max-length",
        40,
        "--json",
    )
    assert code == 0
    assert json.loads(out)["num_cut"] == 1
    assert "1 of 2 samples were longer than 40 tokens and were cut" in err
    assert Scores.load(tmp_path / "s").metadata["details"]["num_cut"] == 1


def bad(tmp_path, name, content):
    file = tmp_path / name
    file.write_text(content)
    return file


def test_bad_input_is_told_in_one_line(capsys, model_folder, data, tmp_path):
    store = ("--store", tmp_path / "s")

    def told(*arguments):
        code, out, err = run(capsys, *arguments)
        assert (code, out) == (2, "")
        assert "Traceback" not in err
        return err.splitlines()[-1]

    broken = bad(tmp_path, "a.jsonl", '{"question": "a", "answer": "b"}\n\n{"question"\n')
    assert "a.jsonl, line 3: not JSON" in told("score", model_folder, broken, *store)
    listed = bad(tmp_path, "b.jsonl", "[1]\n")
    assert "b.jsonl, line 1: should be a JSON object" in told("score", model_folder, listed, *store)
    empty = bad(tmp_path, "c.jsonl", "\n")
    assert "c.jsonl holds no rows" in told("score", model_folder, empty, *store)
    assert "there is no file" in told("score", model_folder, tmp_path / "no.jsonl", *store)
    assert "column 'reply' is missing; there are 'question', 'answer'" in told(
        "score", model_folder, data, "--completion-column", "reply", *store
    )
    bare = tmp_path / "bare"
    tiny_llama().save_pretrained(bare)
    assert "no tokenizer could be loaded from" in told("score", bare, data, *store)
    nothing = tmp_path / "nothing"
    nothing.mkdir()
    assert "neither a config.json nor a GGUF file" in told("score", nothing, data, *store)
    assert "is not a flowdata store" in told("score", model_folder, data, "--store", tmp_path)
    assert "there is no store at" in told("report", tmp_path / "nowhere")
    for option, value, reason in (
        ("--temperature", "-1", "finite and > 0"),
        ("--temperature", "warm", "got 'warm'"),
        ("--limit", "0", "--limit must be at least 1, got 0"),
        ("--limit", "-3", "--limit must be at least 1, got -3"),
        ("--max-length", "0", "--max-length must be at least 1, got 0"),
        ("--device", "tpu9000", "--device tpu9000 can't be used here"),
    ):
        new = ("--store", tmp_path / "t")
        assert reason in told("score", model_folder, data, option, value, *new)
    assert not (tmp_path / "t").exists()
    assert "is a file; a store is a folder" in told(
        "score", model_folder, data, "--store", data / "below"
    )


def test_another_model_is_refused(capsys, model_folder, data, tmp_path, tokenizer):
    other = tmp_path / "other"
    tiny_llama(rope_theta=77.0).save_pretrained(other)
    tokenizer.save_pretrained(other)
    run(capsys, "score", model_folder, data, "--store", tmp_path / "s")
    code, _, err = run(capsys, "score", other, data, "--store", tmp_path / "s")
    assert code == 2
    assert "was made with another model" in err


def test_a_template_can_be_turned_off(capsys, model_folder, data, tmp_path):
    totals = []
    for flag in ("--template", "--no-template"):
        arguments = ("score", model_folder, data, "--store", tmp_path / flag, flag, "--json")
        totals.append(json.loads(run(capsys, *arguments)[1])["targets"])
    assert totals[0] == totals[1]  # completions are the same, prompts are not
    details = [
        Scores.load(tmp_path / f).metadata["details"] for f in ("--template", "--no-template")
    ]
    assert [d["chat_template"] for d in details] == [True, False]


def test_the_module_is_the_command():
    done = subprocess.run(
        [sys.executable, "-m", "flowdata", "--version"], capture_output=True, text=True, check=True
    )
    assert done.stdout.startswith("0.")
    assert Path(sys.executable).with_name("flowdata").exists()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_command_has_a_module_of_its_name_and_says_what_it_does(capsys, name):
    assert COMMANDS[name].__name__ == f"flowdata.cli.commands.{name}"
    with pytest.raises(SystemExit, match="0"):
        run(capsys, name, "--help")
    assert COMMANDS[name].run.__doc__.splitlines()[0] in " ".join(capsys.readouterr().out.split())
    with pytest.raises(SystemExit, match="2"):
        run(capsys, name, "--no-such-option")
