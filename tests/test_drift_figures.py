"""What benchmarks/README.md says of drift is what the pages say that were made of the runs."""

import json
import re

import pytest

from tests import result_pages

RESULTS = result_pages.RESULTS / "drift"
TEXT = result_pages.text(result_pages.BENCHMARKS / "README.md")


def tables(page):
    """A page's tables, in order, each as its rows' cells by the rows' names."""
    return [
        {cells[0]: cells[1:] for cells in table} for table in result_pages.tables(RESULTS / page)
    ]


def span(table, *rows, part=0):
    """The least and the largest of some rows' cells: over all runs, or (part 1) within one rate."""
    values = [float(cell.split(" / ")[part]) for row in rows for cell in table[row]]
    return f"{min(values):.2f} to {max(values):.2f}"


@pytest.fixture(scope="module")
def language():
    return tables("forgetting_drift_language.md")


def largest(table, rule, column=2):
    """The largest rise of WikiText-2's loss of a rule's choices, in nats."""
    return float(re.search(r"\(([+-][\d.]+)\)", table[rule][column])[1])


def test_vision_tells_by_the_probes_as_the_page_does():
    old, tuned, *_ = tables("forgetting_drift.md")
    inverted, noise = ("kl, inverted", "cosine, inverted"), ("kl, noise", "cosine, noise")
    assert (
        f"is {span(old, *inverted)} over all runs and {span(old, *inverted, part=1)} within one "
        f"rate, on smooth noise {span(old, *noise)} and {span(old, *noise, part=1)} (KL and cosine)"
    ) in TEXT
    assert f"tells on every target ({span(tuned, 'cosine, inverted')};" in TEXT


def test_vision_chooses_as_the_page_does():
    all_tables = tables("forgetting_drift.md")
    choices = next(t for t in all_tables if "by drift, inverted" in t)
    means = {
        rule: [float(cell.split(" ± ")[0]) for cell in cells]
        for rule, cells in choices.items()
        if rule != "rule"
    }
    below = {
        rule: [best - mean for best, mean in zip(means["best possible"], of_rule, strict=True)]
        for rule, of_rule in means.items()
    }
    assert max(below["by drift, inverted"]) <= 0.5 + 1e-9
    assert (
        f"the blind choice is {min(below['blind']):.0f} to {max(below['blind']):.0f} below" in TEXT
    )
    smallest, distance = below["smallest rate"], below["least weight distance"]
    assert f"up to {max(smallest):.0f} and {max(distance):.0f}." in TEXT


def test_language_tells_as_the_page_does(language):
    runs, rises = language[:2]
    after_bos = "kl, own text after BOS"
    assert f"rise of their losses is {span(runs, after_bos)}." in TEXT
    assert f"among the runs whose loss rose it is {span(rises, after_bos)}." in TEXT
    assert f"After the beginning of a chat it is {span(runs, 'kl, own text')}," in TEXT
    assert f"new task's own answers {span(runs, 'kl, validation targets')};" in TEXT
    assert (
        f"weight distance has {span(runs, 'weight distance')}, the validation loss "
        f"{span(runs, 'validation loss')}, the gradient norm {span(runs, 'gradient norm')}."
    ) in TEXT


def test_language_lowers_losses_by_as_much_as_is_said():
    falls = []
    for path in RESULTS.glob("forgetting_language_*.jsonl"):
        records = [json.loads(line) for line in path.read_text().splitlines()]
        before = next(r["retained"] for r in records if r["method"] == "pre-trained")
        falls += [before[name] - r["retained"][name] for r in records for name in before]
    assert f"by up to {max(falls):.2f} nats" in TEXT


def test_language_chooses_as_the_page_does(language):
    choices = [table for table in language if "by drift" in table]
    of_all, of_standard = choices[::2], choices[1::2]
    assert len(of_all) == len(of_standard) == 3
    by_drift = max(largest(table, "by drift") for table in choices)
    assert f"falls by {-by_drift:.3f} nats or more on every seed" in TEXT
    smallest = max(largest(table, "smallest rate") for table in of_all)
    assert f"smallest rate by {-smallest:.3f} or more" in TEXT
    blind = max(largest(table, "blind") for table in of_standard)
    assert f"rises by up to {blind:.3f} with shuffled answers" in TEXT
    less = [float(t["by drift"][1]) - float(t["best possible"][1]) for t in of_all]
    assert f"learns {min(less):.2f} to {max(less):.2f} nats less" in TEXT
