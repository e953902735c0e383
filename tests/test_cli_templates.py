"""The chat template on the command line: its file, its variables, cuts, and replies one by one."""

import json

import pytest
import torch

from flowdata import Scores
from flowdata.cli.main import main
from flowdata.text import find_fields, load_model, load_tokenizer, tokenize_rows
from tests import reference
from tests.chat_templates import MULTI, SINGLE, THOUGHTFUL, says, tokenizer_with
from tests.models import tiny_llama

CHATML = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{{ opening | default('') }}{% endif %}"
)
FORGETFUL = (  # only the last reply keeps its reasoning
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% if m['reasoning_content'] and loop.last"
    " %}<think>{{ m['reasoning_content'] }}</think>{% endif %}{{ m['content'] }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)


@pytest.fixture(scope="module")
def tokenizer():
    return tokenizer_with(CHATML + "{# its tokens: <think> </think> #}")


@pytest.fixture(scope="module")
def model_folder(tmp_path_factory, tokenizer):
    folder = tmp_path_factory.mktemp("model")
    tiny_llama(vocab_size=len(tokenizer)).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return str(folder)


def write(path, rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def run(capsys, *arguments):
    code = main([str(argument) for argument in arguments])
    captured = capsys.readouterr()
    return code, captured.out, captured.err


@pytest.fixture
def score(capsys, model_folder, tmp_path):
    def score(data, *options):
        command = ("score", model_folder, data, "--store", tmp_path / "s", "--dtype", "float32")
        return run(capsys, *command, *options)

    return score


@pytest.fixture
def forgetful(tmp_path):
    file = tmp_path / "forgetful.jinja"
    file.write_text(FORGETFUL)
    return file


CHATS = [
    {"messages": THOUGHTFUL},
    {"messages": SINGLE},
    {"messages": [*THOUGHTFUL, says("user", "Ask three?"), says("assistant", "Reply three.")]},
]


def test_replies_one_by_one_are_one_score_a_row(score, forgetful, model_folder, tmp_path, capsys):
    data = write(tmp_path / "chats.jsonl", CHATS)
    options = ("--chat-template", forgetful, "--token-losses", "--columns", "entropy")
    code, out, err = score(data, *options)
    assert code == 0, err
    assert "3 samples scored into" in out
    assert "2 of 3 rows are scored reply by reply" in err
    scores = Scores.load(tmp_path / "s")

    model = load_model(model_folder).eval()
    tokenizer = load_tokenizer(model_folder)
    tokenizer.chat_template = FORGETFUL
    samples = tokenize_rows(CHATS, tokenizer, find_fields(CHATS[0]), template=False)
    assert samples.rows.tolist() == [0, 0, 1, 2, 2, 2]
    for row in range(3):
        parts = [
            reference.causal_lm_sample_loss(model, samples[i])
            for i in range(len(samples))
            if samples.rows[i] == row
        ]
        count = sum(count for _, count in parts)
        assert scores.counts[row] == count
        loss = sum(loss * count for loss, count in parts) / count
        assert scores.losses[row].item() == pytest.approx(loss, abs=1e-4)
        assert scores.token_losses(row).mean().item() == pytest.approx(loss, abs=1e-4)
    assert set(scores.columns) == {"entropy"}
    assert scores.columns["entropy"].isfinite().all()

    code, _, err = score(data, *options)  # again: nothing is scored
    assert code == 0
    assert "losses of 6 samples found" in err
    assert torch.equal(Scores.load(tmp_path / "s").losses, scores.losses)
    code, out, _ = run(capsys, "verify", tmp_path / "s")
    assert (code, out.splitlines()[0]) == (0, "scores.safetensors: whole")
    code, _, err = run(capsys, "report", tmp_path / "s")
    assert code == 0
    assert "without their text" not in err
    page = (tmp_path / "s" / "report" / "report.html").read_text()
    assert "Thought two." in page

    write(data, [*CHATS, CHATS[0]])  # the data has grown
    code, _, err = score(data, *options)
    assert code == 0, err
    grown = Scores.load(tmp_path / "s")
    assert torch.equal(grown.losses[:3], scores.losses)
    assert grown.losses[3].item() == pytest.approx(scores.losses[0].item(), abs=1e-5)


def test_what_can_not_be_joined_is_told_before_the_run(score, forgetful, tmp_path):
    data = write(tmp_path / "chats.jsonl", CHATS)
    code, _, err = score(data, "--chat-template", forgetful, "--columns", "gradient_norm")
    assert code == 2
    assert "must not have 'gradient_norm' where rows are scored reply by reply" in err
    plain = write(tmp_path / "plain.jsonl", [{"messages": SINGLE}])
    assert score(plain)[0] == 0
    code, _, err = score(data, "--chat-template", forgetful)
    assert code == 2
    assert "holds scores of rows that were not scored reply by reply" in err
    assert score(data, "--chat-template", forgetful, "--overwrite")[0] == 0
    assert len(Scores.load(tmp_path / "s")) == 3


def test_a_row_that_is_skipped_keeps_its_place_among_rows_of_replies(score, forgetful, tmp_path):
    rows = [CHATS[0], {"messages": [says("user", "x")]}, CHATS[1]]
    data = write(tmp_path / "chats.jsonl", rows)
    for preview in ((), ("--preview",)):
        code, _, err = score(data, "--chat-template", forgetful, "--on-error", "skip", *preview)
        assert code == 0, err
        assert "1 of 3 rows can't be read and have no loss: row 1: the chat has no message" in err
    scores = Scores.load(tmp_path / "s")
    assert scores.losses.isnan().tolist() == [False, True, False]
    assert list(scores.metadata["skipped"]) == ["1"]


def test_variables_of_the_template_come_from_the_command_line(score, tmp_path):
    data = write(tmp_path / "chats.jsonl", [{"messages": MULTI}])
    code, _, err = score(data, "--template-option", "enable=true")
    assert (code, "has no variable 'enable'" in err) == (2, True)
    code, _, err = score(data, "--template-option", "opening=Well, ")
    assert code == 0
    assert "writes 'Well, ' before a reply that is generated" in err
    details = Scores.load(tmp_path / "s").metadata["details"]
    assert details["template_options"] == {"opening": "Well, "}
    assert details["replies"] == "own"
    with pytest.raises(SystemExit):
        score(data, "--template-option", "enable")


@pytest.mark.parametrize(
    ("value", "read"),
    [
        ("false", False),
        ("False", False),
        ("3", 3),
        ("low", "low"),
        ('["a"]', ["a"]),
        ("a=b", "a=b"),
    ],
)
def test_values_are_read_as_json_where_they_are_any(score, tmp_path, value, read):
    data = write(tmp_path / "chats.jsonl", [{"messages": SINGLE}])
    assert score(data, "--template-option", f"opening={value}")[0] == 0
    details = Scores.load(tmp_path / "s").metadata["details"]
    assert details["template_options"] == {"opening": read}


def test_options_without_effect_are_errors(score, forgetful, tmp_path):
    data = write(tmp_path / "pairs.jsonl", [{"prompt": "a", "completion": "b"}])
    rows = [{"messages": SINGLE}]
    code, _, err = score(write(tmp_path / "chats.jsonl", rows), "--no-template")
    assert code == 2
    assert "--no-template would be ignored" in err
    for options, message in (
        (("--no-template", "--chat-template", forgetful), "--chat-template has no effect"),
        (("--no-template", "--template-option", "opening=a"), "--template-option has no effect"),
        (("--truncation", "keep_end"), "--truncation needs --max-length"),
        (("--chat-template", write(tmp_path / "empty.jinja", [])), "is an empty file"),
        (("--chat-template", tmp_path / "no.jinja"), "no.jinja"),
    ):
        code, _, err = score(data, *options)
        assert code == 2
        assert message in err


def test_lost_targets_are_counted_and_the_prompt_can_be_cut_instead(score, tmp_path):
    rows = [
        {"prompt": "ask " * 30, "completion": "reply"},  # loses all of its target
        {"prompt": "ask", "completion": "reply " * 30},  # loses part of it
        {"prompt": "ask", "completion": "reply"},
    ]
    data = write(tmp_path / "pairs.jsonl", rows)
    options = ("--no-template", "--max-length", 20, "--json")
    code, out, err = score(data, *options)
    assert code == 0
    figures = json.loads(out)
    names = ("num_cut", "num_cut_targets", "num_lost_targets")
    assert [figures[name] for name in names] == [2, 2, 1]
    assert "2 of 3 samples were longer than 20 tokens and were cut" in err
    assert "2 of them lost part or all of their target (1 all of it, and have no loss)" in err
    assert "--truncation keep_end cuts the prompt instead" in err
    assert Scores.load(tmp_path / "s").losses.isnan().tolist() == [True, False, False]
    code, out, err = score(data, *options, "--truncation", "keep_end", "--overwrite")
    assert [json.loads(out)[name] for name in names] == [2, 1, 0]
    assert "instead" not in err
    scores = Scores.load(tmp_path / "s")
    assert scores.counts.min() > 0
    assert scores.metadata["details"]["truncation"] == "keep_end"


def test_rows_that_all_lost_their_targets_are_refused_before_the_model_loads(score, tmp_path):
    rows = [{"prompt": "ask " * 30, "completion": "reply"}] * 3
    data = write(tmp_path / "pairs.jsonl", rows)
    code, _, err = score(data, "--no-template", "--max-length", 20)
    assert code == 2
    assert "all of the 3 that had one lost it at --max-length 20; take a greater length" in err
    assert "or --truncation keep_end" in err
    assert err.endswith("none of the 3 samples has a target: nothing is scored\n")
    assert "causal_lm" not in err


def test_a_template_that_is_wrong_for_all_rows_is_no_reason_to_skip_them(score, tmp_path):
    data = write(tmp_path / "chats.jsonl", [{"messages": SINGLE}])
    broken = tmp_path / "broken.jinja"
    broken.write_text("{% for m in messages %}{{ m['content'] }}")
    for options, message in (
        (("--chat-template", broken), "the chat template is no valid one: Unexpected end"),
        (("--template-option", "enable=1"), "has no variable 'enable'"),
    ):
        code, _, err = score(data, *options, "--on-error", "skip")
        assert code == 2
        assert message in err


def test_a_file_of_which_no_row_can_be_scored_is_refused_with_the_first_reason(score, tmp_path):
    data = write(tmp_path / "chats.jsonl", [{"messages": [says("user", each)]} for each in "ab"])
    code, _, err = score(data, "--on-error", "skip")
    assert code == 2
    assert "flowdata score: no row can be scored; row 0: the chat has no message with role" in err
    assert not (tmp_path / "s").exists()
