"""What benchmarks/README.md says of weights is what the pages say that were made of the runs."""

import re

from benchmarks.forgetting.evidence import CLEAN, STRENGTHS
from tests.result_pages import BENCHMARKS, RESULTS, check_section, tables

PAGES = RESULTS / "evidence"
RARE = "rare_fashion_mnist"
FLIPS = "pairs20_fashion_mnist"
WRONG = [f"wrong{share}_fashion_mnist" for share in (10, 20, 33, 50)]
SIZES = (
    "95 % of the draws",
    "with 10, 20 and 33 % of them",
    "with 20 % pair flips",
    "With 50 %",
    "with up to 33 % wrong",
    "with 33 % wrong",
    "at 0.03",
    "measured with its own",
    "2,075 runs",
)


def cells(page, number=0):
    """The figures of a page's table, by the names of its row and column."""
    heading, *rows = tables(PAGES / f"forgetting_{page}.md")[number]
    return {
        (row[0], column): [float(figure) for figure in re.findall(r"[+-]?\d+\.\d", cell)]
        for row in rows
        for column, cell in zip(heading[1:], row[1:], strict=True)
        if cell != "–"
    }


def outcomes():
    """The figures of the predictions, by their number and set."""
    _, *rows = tables(PAGES / "forgetting_evidence.md")[1]
    return {
        (row[0], row[1]): [float(x) for x in re.findall(r"[+-]?\d+\.\d", row[2])] for row in rows
    }


def span(values):
    return [min(values), max(values)]


def fragments():
    kept, predicted = cells("evidence"), outcomes()
    flow = {name: kept["FLOW", name] for name in (*CLEAN, RARE, *WRONG, FLIPS)}
    mean_weight = {name: kept["standard, smaller steps", name][0] for name in flow}
    yield (
        "FLOW kept {:+.1f} to {:+.1f} on the four clean sets, {:+.1f} where a class is rare.",
        [*span([flow[name][0] for name in CLEAN]), flow[RARE][0]],
    )
    yield (
        "which only makes the steps smaller, kept {:+.1f} to {:+.1f}.",
        span([mean_weight[name] for name in (*CLEAN, RARE)]),
    )
    yield (
        "FLOW kept {:+.1f}, {:+.1f} and {:+.1f}, … {:+.1f}. … open, {:+.1f} ({:+.1f} to {:+.1f}).",
        [*(flow[name][0] for name in (*WRONG[:3], FLIPS)), *flow[WRONG[3]]],
    )
    yield (
        "at the mean weight kept {:+.1f} to {:+.1f} there",
        span([mean_weight[name] for name in (*WRONG, FLIPS)]),
    )
    trimmed = [predicted["4, true share", name][0] for name in (*WRONG[:3], FLIPS, WRONG[3])]
    yield (
        "at the true share: {:+.1f} to {:+.1f} beside FLOW … {:+.1f} with 50 %",
        [*span(trimmed[:4]), trimmed[4]],
    )
    yield (
        "At half of the share it kept {:+.1f} … at the whole {:+.1f}, at twice {:+.1f}.",
        [kept[f"trimmed, {share}%", WRONG[2]][0] for share in (16, 33, 66)],
    )
    anchor = {name: kept["output anchor", name][0] for name in CLEAN}
    yield (
        "the output anchor kept {:+.1f} to {:+.1f} on three of four sets and {:+.1f} on digits;",
        [*span([anchor[name] for name in CLEAN if name != "digits"]), anchor["digits"]],
    )
    best = [
        max(kept[name, target][0] for name in STRENGTHS[kind])
        for kind in ("ℓ2", "WiSE-FT", "LoRA")
        for target in ("fashion_mnist", "digits")
    ]
    yield (
        "ℓ2 {:+.1f} and {:+.1f}, averaging (WiSE-FT) {:+.1f} and {:+.1f}, LoRA {:+.1f} and "
        "{:+.1f};",
        best,
    )
    fixed = "standard, BatchNorm fixed"
    yield (
        "BatchNorm in evaluation mode while training, {:+.1f} and {:+.1f}.",
        [kept[fixed, target][0] for target in ("fashion_mnist", "digits")],
    )
    at_rate = [-predicted["2, hardest tenth, at one rate", name][0] for name in (*CLEAN, RARE)]
    equal = [predicted["2, hardest tenth", name][0] for name in (*CLEAN, RARE)]
    yield "FLOW has {:.1f} to {:.1f} less on the sets with right rows.", span(at_rate)
    yield "Where as much is learned in all it has {:+.1f} to {:+.1f}", span(equal)
    readouts = cells("batch_norm")
    standard, weighed = (
        readouts[f"{name}, 0.03", "fashion_mnist"] for name in ("standard", "FLOW")
    )
    yield (
        "leaves {:.1f} % of CIFAR-10 right, with statistics taken anew {:.1f}, FLOW {:.1f} and "
        "{:.1f}.",
        [*standard[:2], *weighed[:2]],
    )
    choices = cells("choices", 1)  # among the rates of standard fine-tuning
    targets = {target for _, target in choices}
    above = [
        choices["by drift, inverted", target][0] - choices["blind", target][0] for target in targets
    ]
    assert all(
        choices["by drift, inverted", target] == choices["best possible", target]
        for target in targets
    )
    yield "on every set, {:.0f} to {:.0f} above the choice by validation", span(above)


def test_every_figure_on_weights_is_one_of_the_pages():
    check_section(BENCHMARKS / "README.md", "When do weights help?", fragments(), SIZES)
