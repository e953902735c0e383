"""What a report says of a data set in words, and what it finds odd."""

import numpy as np
import pytest
import torch

from flowdata.report.oddities import MARKS, find_oddities
from flowdata.report.report import write_report
from flowdata.report.rule import AVERAGE, HARD, RATE, RIGHT, SHARE, WRONG
from flowdata.report.samples import Piece, shorten
from flowdata.report.summary import summarize
from flowdata.report.verdict import judge, temperatures
from flowdata.scores import Scores
from tests import reference


def verdict_on(losses, counts=None, temperature="median"):
    counts = torch.ones(len(losses), dtype=torch.long) if counts is None else counts
    figures = summarize(losses, counts, temperature)
    return judge(losses, counts, figures, find_oddities(losses, counts))


def noise(count=1000):
    return torch.randn(count, generator=torch.Generator().manual_seed(0))


@pytest.mark.parametrize("losses", [1.4 + 0.2 * noise(), torch.linspace(3.0, 9.3, 100)])
def test_of_weights_that_change_little_the_share_is_told_and_what_to_do_in_doubt(losses):
    verdict = verdict_on(losses)
    share = summarize(losses, torch.ones(len(losses)))["effective_share"]
    assert verdict.title.startswith("The weights would change little but the size of each step: ")
    assert verdict.title.endswith(f"at the median they count as {share:.0%} of the rows.")
    assert verdict.text[1].startswith("That does not say that all rows are right: if some are")
    assert "If you doubt some rows, read the hardest; if few of these are wrong" in verdict.text[1]
    assert RIGHT not in verdict.clauses
    assert verdict.plain_text().endswith(f"second reader.\n{RATE.advice} {AVERAGE.advice}")


def test_of_few_rows_with_a_loss_no_verdict_and_no_share_is_given(tmp_path):
    few, enough = 1.4 + 0.2 * noise(19), 1.4 + 0.2 * noise(20)
    missing = torch.cat([few, torch.full((5,), torch.nan)])
    for losses, rows in ((few[:1], "1 row"), (few, "19 rows"), (missing, "19 rows")):
        report = write_report(Scores(losses), tmp_path)
        title = f"{rows} with a loss: too few to tell what weights would do."
        assert report.verdict.plain_text() == f"{title}\nScore 20 rows or more for a verdict."
        page = report.page.read_text("utf-8")
        assert f"<b>{title}</b>" in page
        assert "effectively" not in page
        assert RATE.advice not in page
    report = write_report(Scores(enough), tmp_path)
    assert report.verdict.clauses == (RATE, AVERAGE)
    assert "effectively" in report.page.read_text("utf-8")
    summary = summarize(few, torch.ones(19))
    odd = find_oddities(few, torch.ones(19))
    verdict = judge(few, torch.ones(19), summary, odd, "the median loss is large")
    assert verdict.text[0] == "The median loss is large."


def test_rows_that_the_model_knows_have_nothing_to_sort_out():
    losses = (0.01 * noise()).abs() ** 1.5
    losses[7] = 0.09
    verdict = verdict_on(losses)
    assert verdict.title == "The model knows all rows already: weights have nothing to sort out."
    assert "is 0.09 nats: of no sample have the targets less than 91%, in" in verdict.text[0]
    assert verdict.clauses == (RATE,)
    losses = torch.cat([(0.01 * noise()).abs(), torch.tensor([0.2])])
    assert "knows all rows" not in verdict_on(losses).title


def test_a_heavy_tail_is_told_with_what_is_in_it():
    losses, counts = (0.5 + 0.1 * noise()).abs(), torch.full((1000,), 40)
    losses[:50], counts[:50] = 6.0, 4
    verdict = verdict_on(losses, counts)
    assert verdict.title.startswith("Some samples are far harder than the rest: read them")
    assert "FLOW acts most on 50 samples (5.0%)" in verdict.text[0]
    assert "4 targets in the median, the others 40" in verdict.text[0]
    assert verdict.clauses == (WRONG, SHARE, HARD, RATE)
    assert verdict.text[1].startswith(WRONG.advice)
    assert verdict.text[2].startswith("Losses can't tell a wrong row from a hard one: read the 50")
    assert verdict.text[3].startswith(
        "This line of Python leaves out the N hardest, about as many as"
    )


def test_the_line_of_python_leaves_out_the_hardest_rows_and_those_without_a_loss(tmp_path):
    losses = (0.5 + 0.1 * noise(40)).abs()
    losses[[3, 9]], losses[7] = 6.0, torch.nan
    rows, scores = [str(number) for number in range(40)], Scores(losses)
    report = write_report(scores, tmp_path)
    assert "as many as are wrong, and the 1 without a loss (" in report.verdict.text[-1]
    assert f"<code>{report.verdict.code}</code>" in report.page.read_text("utf-8")
    assert report.verdict.plain_text().endswith(f":\n  {report.verdict.code}")
    for number, left_out in ((2, ("3", "7", "9")), (0, ("7",))):
        names = {"rows": rows, "scores": scores, "N": number}
        exec(report.verdict.code, names)
        assert names["rows"] == [row for row in rows if row not in left_out]
        assert len(names["scores"]) == 40 - len(left_out)


def test_no_more_rows_are_to_be_read_than_there_are():
    for count, which in ((51, "the 50 hardest, where wrong rows gather,"), (21, "all 21")):
        tail, even = torch.full((count,), 0.5), torch.linspace(0.1, 2.0, count)
        tail[3] = 6.0
        for losses in (tail, even):
            advice = f"a hard one: read {which} and count the wrong."
            words = verdict_on(losses).plain_text()
            assert advice in words
            assert ("until half of the last 50 are right" in words) == (count > 50)
    even[-1] = torch.nan
    assert "read all 20 and count" in verdict_on(even).plain_text()


def test_lists_and_tables_say_where_rows_count_from(tmp_path):
    page = write_report(Scores(torch.rand(50) + 1), tmp_path).page.read_text("utf-8")
    assert page.count("Rows count from 0.") == 3  # all samples, the easiest, the hardest


def test_losses_between_both_and_weights_that_vanish_have_words_of_their_own():
    even = torch.linspace(0.1, 2.0, 500)
    assert "without a heavy tail" in verdict_on(even).title
    assert "nearly vanish" in verdict_on(7 + even, temperature=0.01).title


def test_a_temperature_that_a_user_tries_does_not_change_what_losses_are():
    alike, even = 1.4 + 0.2 * noise(), torch.linspace(0.1, 2.0, 500)
    for temperature in (0.3, 100.0, "ess0.5"):
        verdict = verdict_on(alike, temperature=temperature)
        assert verdict.title.startswith("The weights would change little")
        assert "At the median of the losses, 1.4" in verdict.text[0]
    assert "without a heavy tail" in verdict_on(even, temperature=100.0).title
    sparse = torch.tensor([0.0] * 60 + [0.5] * 40)  # the median is none
    assert verdict_on(sparse, temperature="mean").title


def test_a_rule_that_picks_no_temperature_is_not_offered():
    assert "median" not in temperatures(torch.tensor([0.0, 0.0, 0.0, 1.0]))
    losses = torch.tensor([7.0, 7.1, 7.2, 7.3])
    temperature, origin = temperatures(losses)["ess0.5"]
    weights = (-(losses.double() - origin) / temperature).exp()
    assert (weights.sum() ** 2 / (weights**2).sum()).item() == pytest.approx(2, rel=1e-4)


def test_where_most_losses_are_0_no_rule_is_advised_that_picks_nothing():
    losses = torch.cat([torch.zeros(600), 1e-2 + torch.rand(400)])
    verdict = verdict_on(losses, temperature="mean")
    assert set(temperatures(losses)) == {"mean", "ess0.9"}
    text = verdict.plain_text()
    assert "the median" not in text
    assert "ess0.5" not in text
    mean = f"temperature {losses.mean():.3g}"
    assert f": at {mean} their weights lie below a twentieth" in text
    assert f"are wrong, take the weights, at {mean}." in text
    few = torch.cat([torch.full((990,), 7.0), torch.full((10,), 9.0)])  # no rule for ess0.5
    assert (
        verdict_on(few, temperature=0.5).text[-1].endswith("such as the mean of the losses, 7.02.")
    )


def test_no_loss_next_to_the_median_is_an_outlier_however_close_the_others_lie():
    losses = torch.cat([torch.zeros(600), 1e-3 * torch.rand(398), torch.tensor([0.09, 0.2])])
    ones = torch.ones(1000)
    assert np.flatnonzero(find_oddities(losses, ones).marks["outlier"]).tolist() == [999]
    in_other_unit = find_oddities(losses, ones, unit="").marks["outlier"]
    assert in_other_unit[998:].all()


def test_outliers_stand_out_among_samples_as_long_as_they_are():
    counts = torch.cat([torch.full((300,), 3), torch.full((300,), 90)])
    losses = torch.cat([2 + 0.8 * noise(300), 2 + 0.05 * noise(300)])
    losses[400] = 3.0  # nothing among the short ones, far out among the long
    losses[5] = 12.0
    is_outlier = find_oddities(losses, counts).marks["outlier"]
    assert np.flatnonzero(is_outlier).tolist() == [5, 400]
    assert not find_oddities(torch.ones(100), torch.ones(100)).marks["outlier"].any()
    few = torch.tensor([1.0, 1.1, 50.0])
    assert not find_oddities(few, torch.ones(3)).marks["outlier"].any()


def test_samples_of_one_target_are_not_said_to_be_as_long_as_others(tmp_path):
    losses = (0.5 + 0.1 * noise(200)).abs()
    losses[:4] = 9.0
    one = Scores(losses)
    page = write_report(one, tmp_path).page.read_text("utf-8")
    assert "outliers: their losses lie far above the others'." in page
    assert "as long" not in page
    several = Scores(losses, torch.arange(200) % 2 + 1)
    assert "far above those of samples as long" in write_report(several, tmp_path).page.read_text()


def test_the_verdict_says_plainly_what_is_marked():
    losses = (0.5 + 0.1 * noise(200)).abs()
    losses[:4] = 9.0
    texts = ["same", "same", *map(str, range(198))]
    odd = find_oddities(losses, torch.ones(200), texts)
    verdict = judge(losses, torch.ones(200), summarize(losses, torch.ones(200)), odd)
    marked = " Among them the report marks 4 as outliers, 1 as a copy."
    assert verdict.text[0].endswith(marked)


NAMED = {
    "Losses of mine.jsonl under org/model": {
        "details": {"data": {"source": "/home/me/mine.jsonl"}, "model": "org/model"}
    },
    "Losses of CIFAR-10 under ResNet-20": {"details": {"data": "CIFAR-10", "model": "ResNet-20"}},
    "Losses of flowers &lt;1&gt;": {"identity": {"dataset": "flowers <1>", "model": "2:ab"}},
    "Losses under net": {"identity": {"dataset": "content:2:ab"}, "details": {"model": "./net"}},
    "Losses and weights": {"identity": {"dataset": "part ab of content:2:cd"}, "details": {}},
}


@pytest.mark.parametrize("title", NAMED)
def test_the_title_names_data_and_model_where_the_scores_know_them(title, tmp_path):
    scores = Scores(torch.rand(30), metadata=NAMED[title])
    page = write_report(scores, tmp_path).page.read_text("utf-8")
    assert f"<title>flowdata: {title}</title>" in page
    assert f"<h1>{title}</h1>" in page


def test_that_texts_are_cut_is_said_where_one_is(tmp_path):
    def page(text):
        samples = ["short", "a\x00", text].__getitem__
        return write_report(Scores(torch.rand(3)), tmp_path, samples=samples).page.read_text(
            "utf-8"
        )

    note = "The first 2,000 characters of each sample are here, for the search too."
    assert note not in page("b" * 2000)
    assert note in page("b" * 2001)
    assert note in page("\x00" * 501)  # spelt out they are longer


def test_copies_contradictions_empty_and_missing_samples_are_marked():
    def chat(prompt, target):
        return [Piece(prompt, "user"), Piece(target, "assistant", True)]

    texts = [chat("a", "b"), chat("a", "b"), chat("a", "c"), chat("d", " \n"), chat("d", "e"), "a"]
    texts += ["a", "f"]
    losses = torch.tensor([1.0, 1.0, 1.0, 1.0, 1.0, 1.0, 1.0, torch.nan])
    counts = torch.tensor([1, 1, 1, 1, 1, 1, 1, 0])
    odd = find_oddities(losses, counts, texts, is_cut=np.arange(8) == 2)
    assert set(odd.marks) == set(MARKS)
    marked = {name: np.flatnonzero(marks).tolist() for name, marks in odd.marks.items()}
    assert marked == {
        "outlier": [],
        "copy": [1, 6],
        "contradiction": [0, 1, 2, 3, 4],
        "cut": [2],
        "unreadable": [],
        "empty": [3, 7],
        "no loss": [7],
    }
    assert odd.first.tolist() == [0, 0, 2, 3, 4, 5, 5, 7]


def test_a_row_that_could_not_be_read_is_said_to_be_that_and_not_empty(tmp_path):
    losses, counts = torch.rand(30) + 1, torch.ones(30).long()
    losses[[3, 7]], counts[[3, 7]] = torch.nan, 0
    reasons = {"7": "ValueError: row 7: it has <no> text\u202e"}
    report = write_report(Scores(losses, counts, metadata={"skipped": reasons}), tmp_path)
    page = report.page.read_text("utf-8")
    assert "<b>1</b>row could not be read: row 7: it has &lt;no&gt; text\\x202e<button" in page
    assert "<b>1</b>sample without a target, or with one that is blank<" in page
    assert "<b>2</b>samples without a loss<" in page
    skipped = {str(row): "OSError: gone" for row in range(5)}
    many = Scores(torch.tensor([torch.nan] * 5 + [1.0]), metadata={"skipped": skipped})
    page = write_report(many, tmp_path).page.read_text("utf-8")
    assert f"<b>5</b>rows could not be read: {'OSError: gone; ' * 3}…<" in page


@pytest.mark.parametrize("sign", [-1, 1])
def test_losses_that_go_by_the_length_are_said_to(sign, tmp_path):
    counts = torch.arange(60) % 12 + 1
    losses = 4 + sign * counts / 6 + 0.3 * noise(60)
    hard = {-1: "short", 1: "long"}[sign]
    told = f"{hard} replies are the hard ones: weights would mostly discount {hard} replies ("
    ranks = [torch.tensor(reference.mean_ranks(each.tolist())) for each in (losses, counts)]
    correlation = torch.corrcoef(torch.stack(ranks).double())[0, 1].item()
    metadata = {"identity": {"loss": "causal_lm"}}

    def page(scores):
        return write_report(scores, tmp_path).page.read_text("utf-8")

    told += f"rank correlation of loss and number of targets: {correlation:+.2f})"
    missing = torch.tensor([torch.nan] * 5)
    with_missing = Scores(
        torch.cat([losses, missing]),
        torch.cat([counts, torch.zeros(5).long()]),
        metadata=metadata,
    )
    for scores in (Scores(losses, counts, metadata=metadata), with_missing):
        assert told.replace("-", "−") in page(scores)
    assert "targets are the hard ones" in page(Scores(losses, counts))
    for scores in (
        Scores(losses[:19], counts[:19]),
        Scores(losses),
        Scores(losses[torch.randperm(60, generator=torch.Generator().manual_seed(1))], counts),
    ):
        assert "the hard ones" not in page(scores)


def test_one_is_no_plural(tmp_path):
    losses = torch.full((100,), 1.0)
    losses[4] = 30.0
    counts = torch.full((100,), 2)
    report = write_report(Scores(losses, counts), tmp_path)
    assert "FLOW acts most on 1 sample (1.0%): at the median its weight" in report.verdict.text[0]
    assert "It has 2 targets, the others 2 in the median." in report.verdict.text[0]
    assert "<b>1</b>outlier: its loss lies" in report.page.read_text("utf-8")
    one = Scores(losses[:1], metadata={"details": {"num_cut": 1, "max_length": 9}})
    page = write_report(one, tmp_path).page.read_text("utf-8")
    assert "<b>1</b>sample</div>" in page
    assert "<b>1</b>sample was longer than 9 tokens and was cut" in page
    assert repr(one) == "Scores(1 sample, 0 without a loss)"


def test_short_pieces_leave_their_room_to_long_ones():
    pieces = [Piece("s" * 10, "system"), Piece("u" * 500, "user"), Piece("a" * 90, "a", True)]
    shown = [piece.text for piece in shorten(pieces, 200)]
    assert shown[0] == "s" * 10
    assert shown[1] == "u" * 100 + " … (400 more characters)"
    assert shown[2] == "a" * 90
    assert shorten("\ud800\x00", 50)[0].text == "\\xd800\\x00"


def test_what_was_cut_is_told(tmp_path):
    details = {"num_cut": 1200, "num_cut_targets": 30, "max_length": 2048}
    scores = Scores(torch.rand(50) + 1, metadata={"details": details})
    page = write_report(scores, tmp_path).page.read_text("utf-8")
    assert "<b>1,200</b>samples were longer than 2,048 tokens and were cut; 30 of them" in page
