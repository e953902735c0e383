"""The report's page in a browser: what its reader sees, sorts, searches, weighs and saves."""

import csv
import io
import json
import re

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast

from flowdata.cli import main
from flowdata.drift.comparing import compare
from flowdata.report import Piece, write_report
from flowdata.scores import Scores
from flowdata.text.row_texts import read_rows_of, row_targets
from flowdata.weights import resolve_temperature
from tests.chromium import Chromium
from tests.models import tiny_llama
from tests.test_text import tokenizer

__all__ = ["tokenizer"]  # a fixture of another file
NASTY = "</script><script>document.title = 'taken'</script><b>"
COUNT = 200


@pytest.fixture(scope="module")
def browser(tmp_path_factory):
    browser = Chromium(tmp_path_factory.mktemp("profile"))
    yield browser
    browser.close()


def some_losses(count=COUNT):
    return torch.randn(count, generator=torch.Generator().manual_seed(0)).mul(0.2).exp()


def some_texts(count=COUNT):
    return [[Piece(f"What is {i}?", "user"), Piece(f"It is {i}.", "assistant", True)] for i in
            range(count)]  # fmt: skip


@pytest.fixture(scope="module")
def scores():
    losses = some_losses()
    losses[[10, 20, 30]] = 40.0
    losses[77] = torch.nan
    counts = torch.full((COUNT,), 3)
    counts[:100] = 5
    tokens = torch.arange(int(counts.sum())) % 16 / 4
    return Scores(losses, counts, token_losses=tokens, columns={"entropy": losses / 2})


@pytest.fixture(scope="module")
def texts():
    texts = some_texts()
    texts[5] = texts[3]
    texts[6] = [texts[4][0], Piece(NASTY, "assistant", True)]
    texts[10] = [Piece("=1+1", "user"), Piece('He said: "no", twice', "assistant", True)]
    return texts


@pytest.fixture(scope="module")
def page(tmp_path_factory, scores, texts):
    def words(index):
        return [f" t{place}" for place in range(int(scores.counts[index]))]

    folder = tmp_path_factory.mktemp("report")
    return write_report(scores, folder, samples=texts.__getitem__, words=words).page


def indices(browser):
    return browser.run("[...document.querySelectorAll('#rows > div')].map(row =>"
                       "Number(row.firstChild.textContent.slice(1)))")  # fmt: skip


def click(browser, selector, name):
    browser.run(f"[...document.querySelectorAll({selector!r})].find(each =>"
                f"each.textContent === {name!r}).click()")  # fmt: skip


def text(browser, selector):
    return browser.run(f"document.querySelector({selector!r}).textContent")


def search(browser, query):
    browser.run(f"document.getElementById('search').value = {json.dumps(query)};"
                "document.getElementById('marks').onchange()")  # fmt: skip


def pick(browser, index):
    search(browser, f"#{index}")
    browser.run("document.querySelector('#rows > div').click()")


def saved(browser):
    """The rows of the file that the page's button saves."""
    content = browser.run(
        "URL.createObjectURL = (blob) => { window.saved = blob; return '#'; };"
        "document.getElementById('save').click(); window.saved.text()"
    )
    return list(csv.DictReader(io.StringIO(content, newline="")))


def test_every_heading_sorts_in_both_directions(browser, page, scores):
    browser.open(page)
    missing_first = scores.losses.nan_to_num(-1)
    falling = missing_first.argsort(descending=True, stable=True).tolist()
    seen = indices(browser)
    assert seen == falling[: len(seen)]  # the hardest first, without a click
    click(browser, "#head button", "loss")
    rising = scores.losses.nan_to_num(torch.inf).argsort(stable=True).tolist()
    assert indices(browser) == rising[: len(seen)]
    browser.run("const view = document.getElementById('view'); view.scrollTop = view.scrollHeight;"
                "view.onscroll()")  # fmt: skip
    assert indices(browser)[-1] == 77  # what has no loss is last, in either direction
    click(browser, "#head button", "targets")
    assert indices(browser) == list(range(len(seen)))  # of equals the first comes first
    click(browser, "#head button", "entropy")
    assert indices(browser) == falling[: len(seen)]
    assert browser.errors == []


def test_weights_follow_the_temperature(browser, page, scores):
    browser.open(page)
    present = scores.losses[~scores.losses.isnan()]
    for rule in ("mean", "ess0.5", "ess0.9", "median"):
        click(browser, "#rules button", rule)
        figures = scores.summary(rule)
        told = text(browser, "#effect")
        (size,) = re.findall(r"effective sample size (\d+) of 199", told)
        assert int(size) == pytest.approx(figures["effective_sample_size"], abs=0.51)
        assert f"({round(100 * figures['effective_share'])} %)" in told
        weights = {int(row["index"]): row["weight"] for row in saved(browser)}
        assert weights[77] == ""
        expected = scores.weights(rule, missing="zero")
        assert np.allclose([float(weights[i]) for i in (0, 1, 150)], expected[[0, 1, 150]], 1e-5)
    browser.run("const slider = document.getElementById('temperature'); slider.value = 0.6;"
                "slider.oninput()")  # fmt: skip
    temperature = resolve_temperature(present, "median") * 10**0.3
    assert f"temperature {temperature:.3g}," in text(browser, "#effect")
    (row,) = [row for row in saved(browser) if row["index"] == "0"]
    assert float(row["weight"]) == pytest.approx(
        float(scores.weights(temperature, missing="zero")[0])
    )
    assert browser.errors == []


def test_texts_and_numbers_are_searched(browser, page):
    browser.open(page)
    search(browser, "IS 15")
    assert sorted(indices(browser)) == [15, *range(150, 160)]
    assert text(browser, "#number") == "11 of 200 samples"
    search(browser, "#12")
    assert indices(browser) == [12]
    search(browser, "nowhere")
    assert indices(browser) == []
    search(browser, "")
    assert text(browser, "#number") == "200 of 200 samples"
    browser.run("const box = document.getElementById('search'); box.value = 'is 33?';"
                "box.dispatchEvent(new Event('input'))")  # fmt: skip
    browser.run("new Promise(done => setTimeout(done, 300))")  # the search follows the last key
    assert indices(browser) == [33]


def test_odd_samples_are_marked_shown_and_saved(browser, page, scores):
    browser.open(page)
    browser.run("document.querySelector('[data-mark=outlier]').click()")
    assert text(browser, "#number") == "3 of 200 samples"
    rows = saved(browser)
    assert [(row["index"], row["loss"], row["marks"]) for row in rows] == [
        ("10", "40", "outlier"), ("20", "40", "outlier"), ("30", "40", "outlier")
    ]  # fmt: skip
    assert rows[0]["text"] == '\'=1+1\nHe said: "no", twice'  # no spreadsheet runs it
    assert float(rows[0]["entropy"]) == 20
    browser.run("document.querySelector('[data-mark=copy]').click()")
    assert indices(browser) == [5]
    browser.run("document.querySelector('#rows > div').click()")
    click(browser, "#sample button", "the first is #3")
    assert text(browser, "#sample .facts b") == "#3"
    browser.run("document.querySelector('[data-mark=contradiction]').click()")
    assert sorted(indices(browser)) == [4, 6]
    browser.run("document.querySelector('[data-mark=\"no loss\"]').click()")
    assert indices(browser) == [77]


def test_a_chat_is_shown_as_one_and_is_text_alone(browser, page, scores):
    browser.open(page)
    pick(browser, 6)
    pieces = browser.run("[...document.querySelectorAll('#sample pre span')].map(each =>"
                         "[each.className, each.dataset.role, each.textContent])")  # fmt: skip
    assert pieces == [["prompt", "user", "What is 4?"], ["target", "assistant", NASTY]]
    assert "taken" not in browser.run("document.title")
    cells = browser.run("[...document.querySelectorAll('.heat i')].map(cell => [cell.textContent,"
                        "cell.title, cell.style.getPropertyValue('--heat')])")  # fmt: skip
    losses = scores.token_losses(6).tolist()
    assert [cell[0] for cell in cells] == [" t0", " t1", " t2", " t3", " t4"]
    assert [float(cell[2]) for cell in cells] == pytest.approx([x / 6 for x in losses], abs=0.01)
    assert all(cell[1].endswith(" nats") for cell in cells)


def test_a_row_shows_where_the_reply_begins_however_long_the_prompt_is(browser, tmp_path):
    texts = [
        [Piece("Be kind.", "system"), Piece("q" * 3000, "user"), Piece("Yes, I do.", "a", True)],
        [Piece("Why?", "prompt"), Piece("So\nthere.", "completion", True), Piece("And?", "user")],
        [Piece("all is target", "completion", True)],
        "plain text",
        [Piece("no reply", "user")],
    ]
    losses = torch.tensor([5.0, 4.0, 3.0, 2.0, 1.0])
    browser.open(write_report(Scores(losses), tmp_path, samples=texts.__getitem__).page)
    cells = browser.run(
        "[...document.querySelectorAll('#rows .words')].map(cell =>"
        "[...cell.childNodes].map(node => node.textContent.slice(0, 20)))"
    )
    assert cells == [
        ["q" * 20, "→ Yes, I do."],
        ["Why?", "→ So there. And?"],
        ["all is target"],
        ["plain text"],
        ["no reply"],
    ]
    begin, end, cell = browser.run(
        "{ const cell = document.querySelector('#rows .words'); const range ="
        "document.createRange(); range.selectNodeContents(cell.lastChild); const box ="
        "range.getBoundingClientRect(); [box.left, box.right,"
        "cell.getBoundingClientRect().right] }"
    )
    assert begin < end < cell  # the whole reply is in view
    assert browser.errors == []


def test_token_losses_say_where_they_end_and_where_there_is_none(browser, tmp_path):
    tokens = torch.tensor([0.5, 25.0, torch.nan, torch.inf, 15.8, 15.9]).repeat(20)
    losses = torch.rand(40) + 1
    odd = Scores(losses, torch.full((40,), 3), token_losses=tokens)
    words = ["a\u202e", "b", "c"]
    browser.open(write_report(odd, tmp_path, words=lambda index: words).page)
    shown = []
    for sample in (0, 1):
        pick(browser, sample)
        shown += browser.run("[...document.querySelectorAll('.heat i')].map(each => each.title)")
    assert shown == [
        *("target 1: 0.5 nats", "target 2: ≥ 15.9 nats", "target 3: no loss"),
        *("target 1: ≥ 15.9 nats", "target 2: 15.8 nats", "target 3: ≥ 15.9 nats"),
    ]
    assert text(browser, ".heat") == "a\\x202ebc"
    assert browser.errors == []


def test_a_share_of_few_is_not_none_and_one_of_nearly_all_not_all(browser, tmp_path):
    losses = torch.full((300,), 1.0)
    losses[0] = 0.0
    browser.open(write_report(Scores(losses), tmp_path, temperature=0.05).page)
    assert "(< 1 %)" in text(browser, "#effect")
    browser.open(write_report(Scores(losses), tmp_path, temperature=9.0).page)
    assert "(> 99 %)" in text(browser, "#effect")


def test_of_few_samples_no_share_is_shown(browser, tmp_path):
    browser.open(write_report(Scores(some_losses(19)), tmp_path).page)
    assert "mean weight" in text(browser, "#effect")
    assert "effective" not in text(browser, "#effect")
    browser.open(write_report(Scores(some_losses(20)), tmp_path).page)
    assert "effective sample size" in text(browser, "#effect")


def test_arrow_keys_go_from_sample_to_sample(browser, page):
    browser.open(page)
    first, second = indices(browser)[:2]
    browser.run("document.querySelector('#rows > div').click()")
    for key, index in (("ArrowDown", second), ("ArrowUp", first), ("ArrowUp", first)):
        press = f"new KeyboardEvent('keydown', {{ key: '{key}' }})"
        browser.run(f"document.getElementById('view').dispatchEvent({press})")
        assert text(browser, "#sample .facts b") == f"#{index}"
    assert browser.errors == []


def test_a_page_asks_for_nothing_and_fits_dark_and_narrow_windows(browser, page, tmp_path):
    browser.requests.clear()
    browser.open(page, dark=True, width=380, height=700)
    assert {address.split(":")[0] for address in browser.requests} == {"file", "data"}
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(20, 23, 31)"
    assert browser.run("document.documentElement.scrollWidth <= innerWidth")
    browser.picture(tmp_path / "dark.png")
    assert (tmp_path / "dark.png").stat().st_size > 10_000
    browser.open(page)
    assert browser.run("getComputedStyle(document.body).backgroundColor") == "rgb(255, 255, 255)"


def test_a_hundred_thousand_rows_are_one_small_file_that_opens_at_once(browser, tmp_path):
    count = 100_000
    texts = some_texts(count)
    page = write_report(Scores(some_losses(count)), tmp_path, samples=texts.__getitem__).page
    assert page.stat().st_size < 4_000_000
    assert browser.open(page) < 30  # about one second; the bound is for a busy machine
    assert len(indices(browser)) < 30  # those in view alone
    click(browser, "#head button", "#")
    browser.run("const view = document.getElementById('view'); view.scrollTop = view.scrollHeight;"
                "view.onscroll()")  # fmt: skip
    assert indices(browser)[-1] == count - 1
    search(browser, "is 99999")
    assert indices(browser) == [99_999]
    assert "characters of each sample are here" not in page.read_text("utf-8")  # all are whole


@pytest.mark.parametrize(
    ("losses", "samples"),
    [([0.5], None), ([2.0, 2.0], lambda i: "same"), ([1.0, float("nan"), 0.0, 1e30], None)],
)
def test_odd_losses_make_a_page_without_errors(browser, tmp_path, losses, samples):
    browser.open(write_report(Scores(torch.tensor(losses)), tmp_path, samples=samples).page)
    assert len(indices(browser)) == len(losses)
    pick(browser, 0)
    assert browser.errors == []


def test_images_stand_in_the_table_and_beside_the_sample_that_is_picked(browser, tmp_path):
    scores = Scores(torch.tensor([0.5, 2.0, 1.0]))
    images = {0: torch.rand(3, 32, 32), 1: torch.rand(28, 28), 2: None}
    browser.open(write_report(scores, tmp_path, images=images.get).page)
    assert indices(browser) == [1, 2, 0]
    rows = "[...document.querySelectorAll('#rows > div')]"
    shown = browser.run(f"{rows}.map(row => row.querySelector('img')?.alt)")
    assert shown == ["sample 1", None, "sample 0"]
    for index, width in ((0, 32), (1, 28), (2, None)):
        pick(browser, index)
        assert browser.run("document.querySelector('#sample img')?.naturalWidth") == width
    assert browser.errors == []


def test_two_stores_stand_side_by_side(browser, tmp_path):
    before, after = Scores(torch.tensor([2.0, 1.0, 0.5])), Scores(torch.tensor([0.5, 1.0, 0.75]))
    page = compare(before, after).write(tmp_path, samples=[NASTY, "b", "c"].__getitem__)
    browser.open(page)
    assert indices(browser) == [2, 1, 0]
    rows = saved(browser)
    assert [rows[-1][name] for name in ("change", "before", "after")] == ["-1.5", "2", "0.5"]
    assert "+0.25" in text(browser, "#rows > div")
    assert browser.run("document.querySelector('.temperature').hidden")
    pick(browser, 0)
    assert text(browser, "#sample pre") == NASTY
    assert browser.errors == []


def test_a_store_of_chats_is_reported_with_the_models_own_tokens(
    browser, capsys, tokenizer, tmp_path, caplog
):
    tiny_llama().save_pretrained(tmp_path / "model")
    tokenizer.save_pretrained(tmp_path / "model")
    chats = [
        [
            {"role": "user", "content": f"How much is {n}?"},
            {"role": "assistant", "content": "x" * (n + 1)},
            {"role": "user", "content": "More."},
            {"role": "assistant", "content": "Yes."},
        ]
        for n in range(6)
    ]
    data = tmp_path / "data.jsonl"
    data.write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in chats))
    store = tmp_path / "store"
    command = ("score", tmp_path / "model", data, "--store", store, "--token-losses")
    assert main([str(each) for each in (*command, "--max-length", 200)]) == 0
    assert main(["report", str(store)]) == 0
    browser.open(store / "report" / "report.html")
    pick(browser, 4)
    roles = browser.run("[...document.querySelectorAll('#sample pre span')].map(each =>"
                        "[each.className, each.dataset.role])")  # fmt: skip
    assert roles == [["prompt", "user"], ["target", "assistant"]] * 2
    words = text(browser, "#sample .heat")
    assert "xxxxx" in words
    assert "Yes." in words
    assert "More" not in words
    scores = Scores.load(store)
    cells = browser.run("document.querySelectorAll('.heat i').length")
    assert cells == int(scores.counts[4])
    assert "as they were scored" not in caplog.text

    data.write_text(data.read_text().replace("Yes.", "Nope"))  # another file by the same name
    assert main(["report", str(store)]) == 0
    assert "is not what was scored: its rows are others" in caplog.text
    browser.open(store / "report" / "report.html")
    pick(browser, 4)
    assert text(browser, "#sample .heat") == ""  # losses without words


def test_targets_are_told_by_the_tokenizer_and_the_template_that_were_named(tmp_path, caplog):
    tiny_llama(vocab_size=300).save_pretrained(tmp_path / "model")  # without a tokenizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    bytes_alone = Tokenizer(models.BPE({"</s>": 0} | {c: n for n, c in enumerate(alphabet, 1)}, []))
    bytes_alone.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bytes_alone.decoder = decoders.ByteLevel()
    tokens = PreTrainedTokenizerFast(tokenizer_object=bytes_alone, eos_token="</s>")
    tokens.save_pretrained(tmp_path / "tokenizer")
    template = tmp_path / "template.jinja"
    template.write_text(
        "{% for m in messages %}<{{ m.role }}>{{ m.content }}</s>{% endfor %}"
        "{% if add_generation_prompt %}<assistant>{% endif %}"
    )
    data = tmp_path / "data.jsonl"
    data.write_text('{"prompt": "2?", "completion": "二 is é, 😀"}\n')
    command = ("score", tmp_path / "model", data, "--store", tmp_path / "store", "--token-losses")
    named = ("--tokenizer", tmp_path / "tokenizer", "--chat-template", template)
    assert main([str(each) for each in (*command, *named)]) == 0
    scores = Scores.load(tmp_path / "store")
    targets = row_targets(scores, read_rows_of(scores))
    # What is one character of several bytes stands at its first one.
    assert targets.words(0) == [*"二·· is é·, 😀···", "</s>"]
    assert len(targets.words(0)) == scores.counts[0]
    assert "as they were scored" not in caplog.text


def test_text_that_runs_from_the_right_does_so(browser, tmp_path):
    texts = [[Piece("שלום", "user"), Piece("yes", "assistant", True)]] * 3
    report = write_report(Scores(some_losses(3)), tmp_path, samples=texts.__getitem__)
    browser.open(report.page)
    pick(browser, 0)
    starts = browser.run(
        "[...document.querySelectorAll('#sample pre span')].map(each => {"
        "const range = document.createRange(); range.selectNodeContents(each);"
        "return range.getBoundingClientRect().left - each.getBoundingClientRect().left; })"
    )
    assert starts[0] > 300 > 30 > starts[1]
