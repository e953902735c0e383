"""`flowdata score` on data that grows, rows that can't be read, previews and columns by name."""

import json
from copy import deepcopy

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from tokenizers.decoders import Fuse

import flowdata.scoring.run as scoring_run
from flowdata import LossScorer, Scores
from flowdata.store.places import names_in, place_of, remove_folder, write_whole
from flowdata.text import load_model, load_tokenizer, read_rows, tokenize_rows
from tests.models import tiny_llama
from tests.test_cli import run
from tests.test_text import tokenizer

__all__ = ["tokenizer"]  # the fixture
COUNT = 12
FILES = ["manifest.json", "scores.safetensors"]  # of a finished store


def rows_of(count, start=0):
    return [{"question": f"{n}+1=", "answer": "x" * (n % 5 + 1)} for n in range(start, count)]


def write(file, rows):
    file.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return file


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    """A model whose tokens make text again as they are, without spaces between them."""
    folder = tmp_path_factory.mktemp("model")
    tiny_llama().save_pretrained(folder)
    exact = deepcopy(tokenizer)
    exact.backend_tokenizer.decoder = Fuse()
    exact.save_pretrained(folder)
    return str(folder)


@pytest.fixture(params=["folder", "url"])
def store(request, tmp_path):
    """Where nothing is yet, on the disk and at a URL."""
    yield place_of(tmp_path / "store" if request.param == "folder" else "memory://grown/scores")
    remove_folder(place_of("memory://grown"))


@pytest.fixture
def data(tmp_path):
    return write(tmp_path / "data.jsonl", rows_of(COUNT))


@pytest.fixture
def scored(monkeypatch):
    """How many samples each call ran through the model."""
    counts = []
    run_packs = scoring_run.run_packs

    def counting(job, plan, todo, *arguments):
        counts.append(int(plan.sizes[list(todo)].sum()))
        return run_packs(job, plan, todo, *arguments)

    monkeypatch.setattr("flowdata.scoring.resume.run_packs", counting)
    return counts


def score(capsys, model_folder, data, store, *options):
    command = ("score", model_folder, data, "--store", store, "--dtype", "float32", "--json")
    code, out, err = run(capsys, *command, *options)
    assert code == 0, err
    return json.loads(out), err


def test_a_store_grows_with_its_data(capsys, model_folder, data, tmp_path, store, scored):
    options = ("--token-losses", "--columns", "entropy")
    score(capsys, model_folder, data, store, *options, "--limit", 5)
    facts, err = score(capsys, model_folder, data, store, *options, "--limit", 9)
    assert "has the first 5 of 9 samples; 4 new ones are scored" in err
    assert facts["samples"] == 9
    score(capsys, model_folder, data, store, *options)
    write(data, rows_of(COUNT + 3))
    score(capsys, model_folder, data, store, *options)
    assert scored == [5, 4, 3, 3]
    _, err = score(capsys, model_folder, data, store, *options)
    assert "losses of 15 samples found" in err
    assert len(scored) == 4
    assert names_in(store) == FILES

    grown = Scores.load(store)
    score(capsys, model_folder, data, tmp_path / "at once", *options)
    at_once = Scores.load(tmp_path / "at once")
    assert torch.allclose(grown.losses, at_once.losses, atol=1e-5)
    assert grown.counts.tolist() == at_once.counts.tolist()
    assert torch.allclose(grown.columns["entropy"], at_once.columns["entropy"], atol=1e-5)
    assert torch.allclose(grown.token_losses(13), at_once.token_losses(13), atol=1e-5)
    assert grown.metadata["identity"] == at_once.metadata["identity"]
    assert run(capsys, "verify", store)[0] == 0
    assert run(capsys, "report", store, "--output", tmp_path / "page")[0] == 0


def test_an_unfinished_store_and_an_unfinished_growth_go_on(
    capsys, model_folder, data, store, scored
):
    small_packs = ("--max-tokens", 24)
    run_packs = scoring_run.run_packs
    packs_left = [2]

    def stopping(*arguments):
        for pack in run_packs(*arguments):
            if not packs_left[0]:
                raise KeyboardInterrupt
            packs_left[0] -= 1
            yield pack

    def stop_after(packs, *options):
        packs_left[0] = packs
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr("flowdata.scoring.resume.run_packs", stopping)
            command = ("score", model_folder, data, "--store", store, "--dtype", "float32")
            assert run(capsys, *command, *small_packs, *options)[0] == 130

    stop_after(2, "--limit", 8)
    assert (store / "parts").exists()
    stop_after(7)  # the last 6 of the first 8, and one of the new ones
    assert len(Scores.load(store)) == 8
    assert (store / "new" / "parts").exists()
    write(data, rows_of(COUNT + 2))
    score(capsys, model_folder, data, store, *small_packs)
    assert len(Scores.load(store)) == COUNT + 2
    assert scored == [3, 2]  # of the new ones those that were lacking; what was scored is kept
    assert names_in(store) == FILES


def test_another_change_is_still_refused(capsys, model_folder, data, tmp_path):
    store = tmp_path / "store"
    score(capsys, model_folder, data, store)
    changed = [rows_of(COUNT + 1)[1:], [*rows_of(3), *rows_of(COUNT + 1, 2)], rows_of(COUNT - 1)]
    for rows in changed:
        write(data, rows)
        command = ("score", model_folder, data, "--store", store, "--dtype", "float32")
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "was made with another data set" in err
        assert "or pass --overwrite if its losses are unwanted" in err
        assert "changed since" not in err  # the options are the same
    write(data, rows_of(COUNT + 1))
    code, _, err = run(capsys, *command, "--max-length", 20, "--truncation", "keep_end")
    assert code == 2
    assert "max length was None, is 20; truncation was keep_start, is keep_end" in err
    code, _, err = run(capsys, "score", model_folder, data, "--store", store, "--token-losses")
    assert code == 2
    assert "was made with another choice of token_losses" in err
    assert len(Scores.load(store)) == COUNT


def test_overwriting_begins_anew(capsys, model_folder, data, tmp_path, store, scored):
    score(capsys, model_folder, data, store)
    for folder in ("report", "new", "parts"):
        (store / folder).mkdir()
        write_whole(store / folder / "page.html", b"of the losses that were there")
    write_whole(store / "notes", b"mine")
    write(data, rows_of(4))
    code, _, err = run(capsys, "score", model_folder, data, "--store", store, "--overwrite")
    assert code == 2
    assert "holds notes too" in err
    assert len(Scores.load(store)) == COUNT
    (store / "notes").unlink()
    facts, _ = score(capsys, model_folder, data, store, "--overwrite")
    assert facts["samples"] == 4
    assert scored == [COUNT, 4]
    assert names_in(store) == FILES
    for file in (store / "manifest.json", store / "scores.safetensors"):
        file.unlink()
    write_whole(store / "manifest.json", b'{"format": 1}')
    for command in (("verify", store), ("score", model_folder, data, "--store", store)):
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "reads format 2; score into another folder" in err
    assert score(capsys, model_folder, data, store, "--overwrite")[0]["samples"] == 4
    code, _, err = run(capsys, "score", model_folder, data, "--store", tmp_path, "--overwrite")
    assert code == 2
    assert "is not a flowdata store" in err
    assert data.exists()


def test_a_grown_store_that_is_damaged_is_scored_anew_on_request(capsys, model_folder, data, store):
    score(capsys, model_folder, data, store, "--limit", 4)
    score(capsys, model_folder, data, store)
    file = store / "scores.safetensors"
    content = bytearray(file.read_bytes())
    content[-9] ^= 1
    write_whole(file, bytes(content))
    code, _, err = run(capsys, "score", model_folder, data, "--store", store, "--dtype", "float32")
    assert code == 2
    assert "no part of it can be repaired; --overwrite scores all samples again" in err
    facts, _ = score(capsys, model_folder, data, store, "--overwrite")
    assert facts["samples"] == COUNT


def test_a_stale_draft_of_a_growth_is_no_hindrance(capsys, model_folder, data, tmp_path, store):
    score(capsys, model_folder, data, store, "--limit", 4)
    other = write(tmp_path / "other.jsonl", rows_of(30, 20))
    score(capsys, model_folder, other, store / "new")
    facts, _ = score(capsys, model_folder, data, store)
    assert facts["samples"] == COUNT


def test_rows_that_can_not_be_read_keep_their_place(capsys, model_folder, data, tmp_path):
    lines = data.read_text().splitlines()
    lines[2], lines[7] = "no JSON", json.dumps({"question": "a"})
    data.write_text("\n".join(lines))
    command = ("score", model_folder, data, "--store", tmp_path / "no")
    code, _, err = run(capsys, *command)
    assert code == 2
    assert "data.jsonl, line 3: not JSON" in err
    store = tmp_path / "store"
    facts, err = score(capsys, model_folder, data, store, "--on-error", "skip", "--limit", 9)
    assert "2 of 9 rows can't be read and have no loss: " in err
    assert facts["samples"] == 9
    facts, _ = score(capsys, model_folder, data, store, "--on-error", "skip")
    scores = Scores.load(store)
    assert scores.losses.isnan().nonzero().flatten().tolist() == [2, 7]
    assert sorted(scores.metadata["skipped"]) == ["2", "7"]
    assert "row 7: column 'answer' should hold text" in scores.metadata["skipped"]["7"]
    whole = tokenize_rows(rows_of(COUNT), load_tokenizer(model_folder), template=True)
    assert scores.counts[[0, 1, 3, 11]].tolist() == [
        int((whole[n]["labels"] != -100).sum()) for n in (0, 1, 3, 11)
    ]
    assert run(capsys, "report", store)[0] == 0


def test_a_preview_prints_what_is_recognised_and_loads_no_model(
    capsys, model_folder, tmp_path, monkeypatch
):
    monkeypatch.setattr(
        "flowdata.cli.commands.score.load_model", lambda *a, **k: pytest.fail("loaded")
    )
    row = {"instruction": "Add.", "input": "2, 2", "output": "4", "id": "7"}
    data = write(tmp_path / "data.jsonl", [row] * 40)
    pq.write_table(pa.Table.from_pylist([row]), tmp_path / "data.parquet")
    command = ("score", model_folder, data, "--store", tmp_path / "store", "--preview")
    code, out, err = run(capsys, *command)
    assert (code, err.count("format")) == (0, 0)
    assert out.splitlines() == [
        "format: Alpaca, in 'instruction', 'input', 'output'",
        "scored: the reply in 'output'",
        "not read: 'id'",
        "read where a row has them: 'system', 'history', 'tools', 'documents'",
        "first sample: 2 of its 31 tokens are targets",
        "  prompt | <user>Add.",
        "  prompt | 2, 2</s>",
        "  prompt | <assistant>",
        "  target > 4</s>",
        "checked: the first 40 rows",
    ]
    parquet = [tmp_path / "data.parquet" if part == data else part for part in command]
    assert run(capsys, *parquet)[1] == out.replace("40 rows", "row")
    code, out, _ = run(capsys, *command, "--json")
    assert json.loads(out)["first_sample"][1] == ["4</s>", True]
    assert not (tmp_path / "store").exists()


def test_what_is_recognised_is_told_before_the_second_row_is_read(
    capsys, model_folder, tmp_path, caplog
):
    caplog.set_level("INFO")
    data = write(tmp_path / "data.jsonl", [{"prompt": "a", "completion": "b"}, {"prompt": "c"}])
    for command in (
        ("score", model_folder, data),
        ("drift", model_folder, model_folder, "--probe", data),
    ):
        caplog.clear()
        code, _, err = run(capsys, *command)
        assert code == 2
        assert "row 1: column 'completion' should hold text" in err
        assert "target > b</s>" in caplog.text
    assert run(capsys, "score", model_folder, data, "--preview", "--limit", 1)[0] == 0
    broken = tmp_path / "broken.jsonl"
    broken.write_text('no row\n{"id": 7}\n' + data.read_text())
    assert run(capsys, "score", model_folder, broken, "--preview")[0] == 2
    code, out, _ = run(capsys, "score", model_folder, broken, "--preview", "--on-error", "skip")
    assert (code, out.count("target > b</s>")) == (0, 1)


def test_a_preview_refuses_what_the_run_would_refuse_in_a_later_row(capsys, model_folder, tmp_path):
    turns = [{"from": "human", "value": "a"}, {"from": "gpt", "value": "b"}]
    rows = [{"conversations": turns}] * 50
    tools = '[{"name": "weather", "parameters": {}}]'
    for row in ({"tools": tools}, {"conversations": [{"from": "human", "value": "a"}]}):
        data = write(tmp_path / "data.jsonl", [*rows, {**rows[0], **row}])
        code, out, err = run(capsys, "score", model_folder, data, "--preview")
        assert (code, out) == (2, "")
        assert "row 50" in err
        refusal = err.splitlines()[-1]
        code, _, err = run(capsys, "score", model_folder, data, "--store", tmp_path / "s")
        assert (code, err.splitlines()[-1]) == (2, refusal)
    write(data, rows * 30)
    code, out, _ = run(capsys, "score", model_folder, data, "--preview", "--json")
    assert (code, json.loads(out)["checked_rows"]) == (0, 1024)


def test_a_run_says_what_it_recognised(capsys, model_folder, tmp_path):
    row = {"prompt": "a", "chosen": "b" * 2000, "rejected": "c"}
    data = write(tmp_path / "data.jsonl", [row] * 2)
    _, err = score(capsys, model_folder, data, tmp_path / "store")
    assert "format: preference" in err
    assert "scored: the preferred reply ('chosen'), and not the one in 'rejected'" in err
    assert "b … b" in err
    _, err = score(capsys, model_folder, data, tmp_path / "store", "--quiet")
    assert "format:" not in err


def test_columns_go_by_the_names_that_the_user_gives(capsys, model_folder, tmp_path):
    row = {"q": "a", "a": "b", "about": "c", "who": "d"}
    data = write(tmp_path / "data.jsonl", [row])
    names = ("--prompt-column", "q", "--completion-column", "a", "--system-column", "who")
    command = ("score", model_folder, data, "--preview", "--json", *names)
    _, out, _ = run(capsys, *command, "--input-column", "about")
    assert json.loads(out)["first_sample"][0][0] == "<system>d</s>\n<user>a\nc</s>\n<assistant>"
    code, _, err = run(capsys, *command, "--input-column", "abuot")
    assert code == 2
    assert "column 'abuot' is missing; there are 'q', 'a', 'about', 'who'" in err


def test_a_stream_is_scored_as_the_rows_are(capsys, model_folder, data, tmp_path):
    score(capsys, model_folder, data, tmp_path / "rows")
    score(capsys, model_folder, data, tmp_path / "stream", "--streaming")
    rows, stream = Scores.load(tmp_path / "rows"), Scores.load(tmp_path / "stream")
    assert rows.metadata["identity"] == stream.metadata["identity"]
    assert not isinstance(read_rows(str(data), streaming=True), list)


def answers_to_prompts(file):
    """Four prompts of a few hundred tokens, with six answers each, in turn."""
    prompts = [" ".join(f"{n}+{k}=" for k in range(60)) for n in range(4)]
    return write(file, [{"question": prompts[n % 4], "answer": "x" * (n + 1)} for n in range(24)])


def test_prompts_that_rows_share_are_run_once(capsys, model_folder, tmp_path):
    data = answers_to_prompts(tmp_path / "data.jsonl")
    score = ("score", model_folder, data, "--store", tmp_path / "s", "--dtype", "float32")
    _, _, err = run(capsys, *score)
    assert "shared prompts run once (about " in err
    samples = tokenize_rows(read_rows(str(data)), load_tokenizer(model_folder), template=True)
    assert f"of {len(samples.input_ids):,} tokens (100%)" in err
    alone = LossScorer(load_model(model_folder), dtype="float32", batch_size=1, progress=False)
    losses = alone.score(samples, lengths=samples.lengths).losses
    torch.testing.assert_close(Scores.load(tmp_path / "s").losses, losses, rtol=0, atol=1e-4)


def test_a_store_begun_without_shared_prompts_goes_on_without_them(model_folder, tmp_path):
    data = answers_to_prompts(tmp_path / "data.jsonl")
    samples = tokenize_rows(read_rows(str(data)), load_tokenizer(model_folder), template=False)
    scorer = LossScorer(load_model(model_folder), dtype="float32", max_tokens=900, progress=False)
    store = tmp_path / "s"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("flowdata.scoring.resume.finish", stopped)
        with pytest.raises(InterruptedError):
            scorer.score(samples, store=store, lengths=samples.lengths)
    assert "shared prompts" not in scorer.explain()
    scores = scorer.score(samples, store=store)
    assert scores.metadata["plan"]["shared_prompts"] == 0
    assert len(scores) == 24


def stopped(*_):
    raise InterruptedError
