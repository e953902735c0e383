"""What benchmarks/README.md says of drift is what the pages say that were made of the runs."""

import json
import re

from tests import result_pages

RESULTS = result_pages.RESULTS / "drift"
EVIDENCE = result_pages.RESULTS / "evidence"
VISION = RESULTS / "forgetting_drift.md"
SHUFFLED = "noisy_fashion_mnist"
SIZES = ("1,500 images", "also at 0.1", "48 rows, three rates", "The 0.9 that was asked for")


def tables(page):
    """A page's tables, in order, each as its rows' cells by the rows' names."""
    return [{cells[0]: cells[1:] for cells in table} for table in result_pages.tables(page)]


def of_targets(table, first_row="rule"):
    """A table's first figures, by the names of its row and column."""
    targets = table[first_row]
    return {
        (row, target): float(cell.split(" ")[0])
        for row, cells in table.items()
        if row != first_row
        for target, cell in zip(targets, cells, strict=True)
    }


def span(table, *rows, part=0):
    """The least and the largest of some rows' cells: over all runs, or (part 1) within one rate."""
    values = [float(cell.split(" / ")[part]) for row in rows for cell in table[row]]
    return [min(values), max(values)]


def both(table, name, part=0):
    """Those of a sign by the inverted images and by noise."""
    return [
        end for probe in ("inverted", "noise") for end in span(table, f"{name}, {probe}", part=part)
    ]


def num_runs(pattern):
    return sum(len(path.read_text("utf-8").splitlines()) for path in RESULTS.glob(pattern))


def below_the_best(table):
    """How far each rule's choice lies below the best possible, by rule and target."""
    averages = of_targets(table)
    return {
        (rule, target): averages["best possible", target] - average
        for (rule, target), average in averages.items()
    }


def of_rule(below, rule):
    return [off for (name, _), off in below.items() if name == rule]


def what_vision_tells():
    yield (
        "five seeds, {} runs on",
        [num_runs("forgetting_[!l]*.jsonl") + num_runs("*letters.jsonl")],
    )
    old, tuned, with_anchor, *_ = tables(VISION)
    of_evidence = tables(EVIDENCE / "forgetting_choices.md")[2]
    inverted, noise = ("kl, inverted", "cosine, inverted"), ("kl, noise", "cosine, noise")
    yield (
        "is {:.2f} to {:.2f} over all runs but the output anchor's and {:.2f} to {:.2f} within one "
        "rate, on smooth noise {:.2f} to {:.2f} and {:.2f} to {:.2f} (KL and cosine)",
        [
            *(*span(old, *inverted), *span(old, *inverted, part=1)),
            *(*span(old, *noise), *span(old, *noise, part=1)),
        ],
    )
    yield (
        "runs, by inverted images and by noise, the KL has {:.2f} to {:.2f} and {:.2f} to {:.2f} "
        "over all runs, the cosine {:.2f} to {:.2f} and {:.2f} to {:.2f}; on "
        "the eleven sets of the evidence {:.2f} to {:.2f} and {:.2f} to "
        "{:.2f}, and {:.2f} to {:.2f} and {:.2f} to {:.2f}.",
        [
            value
            for t in (with_anchor, of_evidence)
            for name in ("kl", "cosine")
            for value in both(t, name)
        ],
    )
    yield (
        "**Within one rate it tells less there**: the KL has {:.2f} to {:.2f} and {:.2f} to "
        "{:.2f}, the cosine {:.2f} to {:.2f} and {:.2f} to {:.2f}.",
        [end for name in ("kl", "cosine") for end in both(of_evidence, name, part=1)],
    )
    digits = old["sign"].index("digits")
    held, *others = (float(cell.split(" / ")[1]) for cell in tuned["cosine, inverted"])
    assert tuned["sign"][0] == "digits"
    yield (
        "(digits: {:.2f} within one rate)… ({:.2f} to {:.2f}; within one rate {:.2f} on digits, "
        "{:.2f} and more elsewhere)",
        [
            float(old["kl, new task"][digits].split(" / ")[1]),
            *(*span(tuned, "cosine, inverted"), held, min(others)),
        ],
    )


def what_vision_chooses():
    everything, _, standard = (t for t in tables(VISION) if "by drift, inverted" in t)
    below = below_the_best(everything)
    yield (
        "is within {:.1f} points of the best possible average on every target; the blind choice is "
        "{:.0f} to {:.0f} below the best, … up to {:.0f} and {:.0f}.",
        [
            max(of_rule(below, "by drift, inverted")),
            *(min(of_rule(below, "blind")), max(of_rule(below, "blind"))),
            *(max(of_rule(below, rule)) for rule in ("smallest rate", "least weight distance")),
        ],
    )
    assert not any(of_rule(below_the_best(standard), "by drift, inverted"))
    yield "it chooses the best on all five targets; on digits a new head alone is better still.", []
    averages = of_targets(everything)
    assert averages["linear probe", "digits"] > of_targets(standard)["best possible", "digits"]
    yield (
        "loses {:.1f} points, by noise {:.1f}, by inverted images {:.1f}.",
        [below[f"by drift, {probe}", "letters"] for probe in ("new task", "noise", "inverted")],
    )


def what_holds():
    cells = result_pages.tables(VISION)[-1]
    table = {row[0]: dict(zip(cells[0][1:], row[1:], strict=True)) for row in cells[2:]}
    kept = {
        method: {target: float(cell.split(" ")[0]) for target, cell in of_method.items()}
        for method, of_method in table.items()
    }
    clean = ("fashion_mnist", "letters", "textures")
    anchor = [kept["output anchor"][target] for target in clean]
    assert all(
        "to +" in table["output anchor"][t] and "(+" in table["output anchor"][t] for t in clean
    )
    assert "(-" in table["output anchor"]["digits"]
    yield (
        "({:.1f} to {:.1f} points over standard fine-tuning, each off 0; digits leave it open) and "
        "with shuffled labels ({:.1f}); WiSE-FT on letters ({:.1f}) and with shuffled labels "
        "({:.1f}); FLOW with shuffled labels ({:.1f}), and on clean ones it keeps less ({:.0f} to "
        "{:.0f} below).",
        [
            *(min(anchor), max(anchor), kept["output anchor"][SHUFFLED]),
            *(kept["WiSE-FT"]["letters"], kept["WiSE-FT"][SHUFFLED], kept["FLOW"][SHUFFLED]),
            *sorted(-kept["FLOW"][target] for target in (*clean, "digits"))[::3],
        ],
    )


def falls():
    """By how much runs lower the losses of old texts, in nats."""
    for path in RESULTS.glob("forgetting_language_*.jsonl"):
        records = [json.loads(line) for line in path.read_text("utf-8").splitlines()]
        before = next(r["retained"] for r in records if r["method"] == "pre-trained")
        yield from (before[name] - r["retained"][name] for r in records for name in before)


def what_language_tells():
    yield "three seeds, {} runs on", [num_runs("forgetting_language_*.jsonl")]
    runs, rises = tables(RESULTS / "forgetting_drift_language.md")[:2]
    after_bos = "kl, own text after BOS"
    yield "rise of their losses is {:.2f} to {:.2f}.", span(runs, after_bos)
    yield "by up to {:.2f} nats", [max(falls())]
    yield "among the runs whose loss rose it is {:.2f} to {:.2f}.", span(rises, after_bos)
    yield (
        "beginning of a chat it is {:.2f} to {:.2f}, on the new task's own answers {:.2f} to "
        "{:.2f}; weight distance has {:.2f} to {:.2f}, the validation loss {:.2f} to {:.2f}, the "
        "gradient norm {:.2f} to {:.2f}.",
        [
            value
            for sign in (
                *("kl, own text", "kl, validation targets"),
                *("weight distance", "validation loss", "gradient norm"),
            )
            for value in span(runs, sign)
        ],
    )


def largest(table, rule, column=2):
    """The largest rise of WikiText-2's loss of a rule's choices, in nats."""
    return float(re.search(r"\(([+-][\d.]+)\)", table[rule][column])[1])


def what_language_chooses():
    page = tables(RESULTS / "forgetting_drift_language.md")
    choices = [table for table in page if "by drift" in table]
    of_all, of_standard = choices[::2], choices[1::2]
    assert len(of_all) == len(of_standard) == 3
    yield "falls by {:.3f} nats or more on", [-max(largest(t, "by drift") for t in choices)]
    yield "smallest rate by {:.3f} or more.", [-max(largest(t, "smallest rate") for t in of_all)]
    yield "rises by up to {:.3f} with", [max(largest(table, "blind") for table in of_standard)]
    less = [float(t["by drift"][1]) - float(t["best possible"][1]) for t in of_all]
    assert all(t["blind"] == t["best possible"] for t in of_all)
    yield (
        "Among all methods validation alone took the best possible run on all three sets, and "
        "drift is more careful than it had to be: it takes averages with the frozen weights, and "
        "learns {:.2f} to {:.2f} nats less.",
        [min(less), max(less)],
    )


def test_every_figure_on_drift_is_one_of_the_pages():
    fragments = [
        *(*what_vision_tells(), *what_vision_chooses(), *what_holds()),
        *(*what_language_tells(), *what_language_chooses()),
    ]
    result_pages.check_section(result_pages.BENCHMARKS / "README.md", "Drift", fragments, SIZES)


def test_the_guide_on_drift_says_the_same():
    old, _, with_anchor, *_ = tables(VISION)
    signs = ("cosine, inverted", "cosine, noise")
    spans = [span(t, *signs, part=part) for t in (old, with_anchor) for part in (0, 1)]
    said = (
        "rank correlation was {:.2f} to {:.2f}, among runs at the same rate {:.2f} to {:.2f} (the… "
        "with these it was {:.2f} to {:.2f}, and {:.2f} to {:.2f}."
    )
    guide = result_pages.GUIDES / "drift.md"
    figures = [value for each in spans for value in each]
    result_pages.check_section(guide, "Drift: what did my model forget?", [(said, figures)])
