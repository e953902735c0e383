import json
import re
import subprocess
import sys
from html.parser import HTMLParser

import pytest
import torch

from flowdata.drift.comparing import compare
from flowdata.report import Piece
from flowdata.report.pictures import (
    draw_lengths,
    draw_losses,
    draw_weights,
    figure,
    sample_points,
)
from flowdata.report.report import write_report
from flowdata.report.summary import QUANTILES, extremes
from flowdata.scores import Scores
from tests import reference

PNG = b"\x89PNG\r\n\x1a\n"


def some_scores(samples=200, missing=(3, 77)):
    generator = torch.Generator().manual_seed(0)
    losses = torch.randn(samples, generator=generator).mul(0.5).exp()
    losses[list(missing)] = torch.nan
    counts = torch.randint(1, 50, (samples,), generator=generator)
    return Scores(losses, counts, metadata={"identity": {"loss": "causal_lm"}})


@pytest.mark.parametrize("rule", ["median", "q0.25", 0.7])
def test_the_summary_matches_the_obvious_figures(rule):
    scores = some_scores()
    present = [loss for loss in scores.losses.tolist() if loss == loss]
    temperature = {"median": reference.median(present), "q0.25": reference.quantile(present, 0.25)}
    temperature = temperature.get(rule, 0.7)
    weights = reference.flow_weights(present, temperature)
    summary = scores.summary(rule)
    assert summary["samples"] == 200
    assert summary["missing"] == 2
    assert summary["targets"] == int(scores.counts.sum())
    assert summary["temperature"] == pytest.approx(temperature)
    assert summary["temperature_rule"] == ("given" if rule == 0.7 else rule)
    assert summary["loss"]["mean"] == pytest.approx(sum(present) / 198)
    for name, share in QUANTILES.items():
        assert summary["loss"][name] == pytest.approx(reference.quantile(present, share), rel=1e-5)
    assert summary["weight"]["mean"] == pytest.approx(sum(weights) / 198, rel=1e-5)
    assert summary["weight"]["min"] == pytest.approx(min(weights), rel=1e-5)
    assert summary["weight"]["max"] == pytest.approx(max(weights), rel=1e-5)
    effective = reference.effective_sample_size(weights)
    assert summary["effective_sample_size"] == pytest.approx(effective, rel=1e-5)
    assert summary["effective_share"] == pytest.approx(effective / 198, rel=1e-5)
    assert summary == json.loads(json.dumps(summary))


def test_a_callable_rule_is_named():
    def smallest(losses):
        return losses.min().item()

    assert some_scores().summary(smallest)["temperature_rule"] == "smallest"


def test_extremes_are_those_of_a_full_sort():
    scores = some_scores()
    present = [i for i in range(200) if i not in (3, 77)]
    ordered = sorted(present, key=lambda i: scores.losses[i].item())
    easy, hard = extremes(scores.losses, 7)
    assert easy == ordered[:7]
    assert hard == ordered[::-1][:7]
    assert sorted(extremes(scores.losses, 1000)[0]) == present


@pytest.mark.parametrize("samples", [1, 2, 4999, 5000, 5001, 2**24 + 3, 20_000_000, 2**31 + 5])
def test_points_are_of_samples_that_there_are(samples):
    places, _ = sample_points(samples)
    assert len(places) == min(samples, 5000)
    assert (places[0], places[-1]) == (0, samples - 1)
    steps = places.diff()
    assert not len(steps) or steps.max() - steps.min() <= 1
    assert places.dtype == torch.int64


def test_the_picture_is_a_png_of_the_distribution_asked_for(tmp_path):
    scores = some_scores()
    median = scores.plot(tmp_path / "new" / "median.png")
    quarter = scores.plot(tmp_path / "quarter.png", temperature="q0.25")
    assert median == tmp_path / "new" / "median.png"
    assert median.read_bytes().startswith(PNG)
    assert quarter.read_bytes().startswith(PNG)
    assert quarter.read_bytes() != median.read_bytes()


@pytest.mark.parametrize("losses", [[0.5], [0.0, 1.0, 1.0], [2.0, 2.0], [0.1, 0.1, 1e6]])
def test_odd_distributions_are_drawn_without_a_warning(tmp_path, losses, recwarn):
    write_report(Scores(torch.tensor(losses)), tmp_path)
    assert not recwarn.list


class Page(HTMLParser):
    """Text, tags and attributes of a page; fails on a tag that closes what isn't open."""

    def __init__(self, source):
        super().__init__()
        self.text, self.tags, self.attributes, self.open = "", [], [], []
        self.feed(source)
        assert self.open == []

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)
        self.attributes += [value for _, value in attrs if value]
        if tag not in ("meta", "img", "source", "input"):
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag

    def handle_data(self, data):
        self.text += data


def test_the_page_shows_figures_and_samples_and_stands_alone(tmp_path):
    scores = some_scores()
    report = write_report(scores, tmp_path, samples=lambda i: f"text of {i}.", top=4)
    source = report.page.read_text(encoding="utf-8")
    page = Page(source)
    easy, hard = extremes(scores.losses, 4)
    assert re.findall(r"text of (\d+)\.", page.text) == [str(i) for i in easy + hard]
    for index in easy + hard:
        assert f"#{index}" in page.text
    assert "200samples, 2 without a loss" in page.text
    assert f"{report.summary['temperature']:.3g}temperature (median)" in page.text
    assert "causal_lm" in page.text
    assert page.tags.count("script") == 2  # the table's data and its code, both in the page
    outside = [value for value in page.attributes if re.match(r"(https?:)?//|[^d].*\.png", value)]
    assert outside == []
    assert source.count("data:image/png;base64,") == 6  # three pictures, light and dark
    assert report.picture.read_bytes().startswith(PNG)


def test_every_text_is_escaped(tmp_path):
    nasty = "</pre><script>alert('&')</script> {body} <img src=x onerror=\"y\">"
    scores = Scores(torch.tensor([0.5, 1.0]), metadata={
        "identity": {nasty: nasty}, "details": {"data": {nasty: [nasty]}}
    })  # fmt: skip
    page = Page(write_report(scores, tmp_path, samples=lambda _: nasty).page.read_text("utf-8"))
    assert page.tags.count("script") == 2  # none of them is the sample's
    assert page.tags.count("img") == 2
    assert page.text.count(nasty) == 6  # two samples in two lists, a name and a value


def test_a_long_sample_is_cut_with_a_count(tmp_path):
    scores = Scores(torch.tensor([1.0]))
    text = "ab" * 1000
    page = write_report(scores, tmp_path, samples=lambda _: text).page.read_text("utf-8")
    assert "ab … (1,400 more characters)" in page
    assert text not in page


def test_without_texts_or_with_no_samples_listed_the_page_shows_numbers(tmp_path):
    scores = some_scores()
    assert "<pre>" not in write_report(scores, tmp_path).page.read_text("utf-8")


def test_what_can_not_be_seen_is_spelt_out(tmp_path):
    scores = Scores(torch.tensor([0.5]))
    page = write_report(scores, tmp_path, samples=lambda _: "a\0b\u202ec\nd").page
    assert "<pre>a\\x00b\\x202ec\nd</pre>" in page.read_text("utf-8")
    assert "Easiest samples" not in write_report(scores, tmp_path, top=0).page.read_text("utf-8")


def test_titles_hide_and_turn_nothing(tmp_path):
    for name, shown in (("/x/a\u202egnp.jsonl", "a\\x202egnp.jsonl"), ("d\udcff", "d\\xdcff")):
        scores = Scores(torch.rand(30), metadata={"details": {"data": name, "o\u202e": 1}})
        text = [Piece("a", "us\u202eer")]
        page = write_report(scores, tmp_path, samples=lambda i, text=text: text).page
        source = page.read_text("utf-8")
        assert f"<h1>Losses of {shown}</h1>" in source
        assert "\u202e" not in source


def test_losses_that_are_no_likelihoods_have_no_nats(tmp_path, monkeypatch):
    labels = []
    monkeypatch.setattr("matplotlib.axes.Axes.set_xlabel", lambda axes, text: labels.append(text))
    losses, counts = torch.rand(40) * 3, torch.arange(40) % 3 + 1
    for loss, has_unit in (("mse", False), ("callable:2:ab", False), ("causal_lm", True)):
        scores = Scores(losses, counts, metadata={"identity": {"loss": loss}})
        labels.clear()
        page = write_report(scores, tmp_path).page.read_text("utf-8")
        page += compare(scores, scores).write(tmp_path).read_text("utf-8")
        assert ("mean loss (nats)" in page) == ("mean loss before (nats)" in page) == has_unit
        assert any("nats" in label for label in labels) == has_unit
        assert ("loss" in labels) != has_unit


@pytest.mark.parametrize(("outside", "told"), [(0, ""), (1, "1 larger one"), (2, "2 larger ones")])
def test_the_last_bar_says_how_many_larger_losses_it_holds(outside, told):
    losses = torch.ones(1000)
    losses[:outside] = 9.0
    with figure(4, 3) as (_, axes):
        draw_losses(axes, losses, 1.0)
        label = axes.get_xlabel()
    assert label == "loss (nats)" + f"; the last bar holds {told}, up to 9" * bool(told)


def test_samples_are_counted_in_whole_numbers():
    for draw in (lambda axes: draw_losses(axes, torch.ones(1), 1.0),
                 lambda axes: draw_weights(axes, torch.ones(2))):  # fmt: skip
        with figure(4, 3) as (_, axes):
            draw(axes)
            assert all(tick == int(tick) for tick in axes.get_yticks())


@pytest.mark.parametrize("counts", [torch.full((30,), 8), torch.arange(30) % 2 + 7])
def test_targets_are_drawn_at_whole_numbers_and_the_line_has_a_name(counts):
    with figure(4, 3) as (_, axes):
        draw_lengths(axes, torch.rand(30), counts)
        low, high = axes.get_xlim()
        ticks = [tick for tick in axes.get_xticks() if low <= tick <= high]
        (name,) = [text.get_text() for text in axes.get_legend().get_texts()]
    assert ticks == sorted({*counts.tolist()})
    assert name == "median of samples about as long"


def test_few_samples_are_not_none_and_nearly_all_not_all(tmp_path):
    before, after = torch.ones(2000), torch.full((2000,), 0.9)
    after[:5] = 3.0
    page = compare(Scores(before), Scores(after)).write(tmp_path).read_text("utf-8")
    assert "<b>&gt; 99%</b>of them learned" in page
    assert "<b>&lt; 1%</b>of them forgotten" in page
    few = write_report(Scores(torch.cat([torch.zeros(1), before])), tmp_path, temperature=0.05)
    assert "<b>&lt; 1%</b>of the samples, effectively" in few.page.read_text("utf-8")
    assert " 1 of 2,001 samples (< 1%)" in few.verdict.text[0]


def test_bad_input_is_named(tmp_path):
    with pytest.raises(ValueError, match="none of the 2 samples has a loss"):
        Scores(torch.tensor([float("nan")] * 2)).summary()
    with pytest.raises(ValueError, match="top must be >= 0, got -1"):
        write_report(some_scores(), tmp_path, top=-1)
    with pytest.raises(ValueError, match="pass a positive float"):
        write_report(Scores(torch.tensor([0.0, 0.0, 1.0])), tmp_path)
    assert list(tmp_path.iterdir()) == []


def test_a_missing_matplotlib_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(ImportError, match=re.escape('pip install "flowdata-torch[plotting]"')):
        some_scores().plot(tmp_path / "losses.png")


def test_the_module_and_a_summary_need_no_matplotlib():
    code = (
        "import sys, torch, flowdata.report.summary\n"
        "flowdata.Scores(torch.tensor([1.0])).summary()\n"
        "assert 'matplotlib' not in sys.modules"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_the_users_matplotlib_settings_stay_as_they_are(tmp_path):
    matplotlib = pytest.importorskip("matplotlib")
    before = dict(matplotlib.rcParams)
    backend = matplotlib.get_backend()
    some_scores().plot(tmp_path / "losses.png")
    assert dict(matplotlib.rcParams) == before
    assert matplotlib.get_backend() == backend


def test_figures_and_page_show_ess_weights_relative_to_the_smallest_loss(tmp_path):
    losses = 7 + 0.05 * torch.randn(100, generator=torch.Generator().manual_seed(0))
    scores = Scores(losses)
    report = write_report(scores, tmp_path, temperature="ess0.5", top=1)
    assert report.summary["weight"]["max"] == 1
    assert report.summary["effective_share"] == pytest.approx(0.5, rel=1e-4)
    page = report.page.read_text()
    assert f"<tr><th>easiest</th><td>{losses.min():.3g}</td><td>1</td></tr>" in page
    assert '--weight:1.0000"' in page


def test_vanishing_weights_are_reported_with_one_warning(tmp_path, caplog):
    report = write_report(Scores(torch.tensor([7.0, 8.0, 9.0])), tmp_path, temperature=1e-3)
    (record,) = caplog.records
    assert "have a mean of 0, so that" in record.message
    assert report.summary["effective_sample_size"] == 0
