"""What benchmarks/README.md says of weights is what the pages say that were made of the runs."""

import json
import re
from statistics import mean

from benchmarks.forgetting.evidence import CLEAN, STRENGTHS
from tests.result_pages import BENCHMARKS, GUIDES, RESULTS, check_section, tables, text

PAGES = RESULTS / "evidence"
RARE = "rare_fashion_mnist"
FLIPS = "pairs20_fashion_mnist"
WRONG = [f"wrong{share}_fashion_mnist" for share in (10, 20, 33, 50)]
SIZES = (
    "95 % of the draws",
    "with up to 33 % wrong",
    "with 33 % wrong",
    "with 33 % wrong",
    "measured with its own",
    "with 10 to 50 %",
    "with 10 to 33 % wrong",
)


def cells(page, number=0, folder=PAGES):
    """The figures of a page's table, by the names of its row and column."""
    heading, seeds, *rows = tables(folder / f"forgetting_{page}.md")[number]
    assert set(seeds) == {"seeds", "5"}
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


def below_the_best(choices):
    """How far each rule's choice lies below the best possible, in points, by rule and set."""
    return {
        (rule, target): round(choices["best possible", target][0] - value, 1)
        for (rule, target), (value, *_) in choices.items()
    }


def num_runs():
    """The runs of all sets, by the sentence that begins the page."""
    counts = re.findall(r"\((\d+) runs", (PAGES / "forgetting_evidence.md").read_text("utf-8"))
    return sum(map(int, counts))


def fragments():
    yield (
        "Five seeds, {:,} runs on an AMD CPU without AMX; with `--processes 2` they take {:.1f} "
        "hours on two cores, by 24 that were timed, longer than the three that were meant",
        [num_runs(), hours()],
    )
    kept, predicted = cells("evidence"), outcomes()
    flow = {name: kept["FLOW", name] for name in (*CLEAN, RARE, *WRONG, FLIPS)}
    mean_weight = {name: kept["standard, smaller steps", name][0] for name in flow}
    assert all(flow[name][0] < 0 for name in (*CLEAN, RARE))
    yield (
        "**Where all rows are right weights don't help**: FLOW kept {:+.1f} to {:+.1f} on the four "
        "clean sets, {:+.1f} where a class is rare.",
        [*span([flow[name][0] for name in CLEAN]), flow[RARE][0]],
    )
    yield (
        "which only makes the steps smaller, kept {:+.1f} to {:+.1f}.",
        span([mean_weight[name] for name in (*CLEAN, RARE)]),
    )
    assert all(flow[name][1] > 0 for name in (*WRONG[:3], FLIPS))
    assert flow[WRONG[3]][1] < 0 < flow[WRONG[3]][2]
    yield (
        "**Where labels are wrong they do**: with 10, 20 and 33 % of them FLOW kept {:+.1f}, "
        "{:+.1f} and {:+.1f}, with 20 % pair flips {:+.1f}. With 50 % it is open, {:+.1f} "
        "({:+.1f} to {:+.1f}).",
        [*(flow[name][0] for name in (*WRONG[:3], FLIPS)), *flow[WRONG[3]]],
    )
    yield (
        "at the mean weight kept {:+.1f} to {:+.1f} there",
        span([mean_weight[name] for name in (*WRONG, FLIPS)]),
    )
    trimmed = [predicted["4, true share", name][0] for name in (*WRONG[:3], FLIPS, WRONG[3])]
    yield (
        "**Leaving out the hardest rows does as well or better**, at the true share: {:+.1f} to "
        "{:+.1f} beside FLOW … {:+.1f} with 50 %",
        [*span(trimmed[:4]), trimmed[4]],
    )
    shares = {WRONG[0]: (5, 10, 20), WRONG[1]: (10, 20, 40), WRONG[2]: (16, 33, 66)}
    of_shares = zip(
        *([kept[f"trimmed, {each}%", name][0] for each in of] for name, of in shares.items()),
        strict=True,
    )
    few, true, many = of_shares
    assert all(low < high for low, high in zip(few, many, strict=True))
    yield (
        "half of the share {:+.1f} to {:+.1f}, at the whole {:+.1f} to {:+.1f}, at twice {:+.1f} "
        "to {:+.1f}, so that too many cost less than too few.",
        [end for values in (few, true, many) for end in span(values)],
    )
    small = [
        kept[f"small losses, {share}%", name][0]
        for share, name in zip((10, 20, 33, 50, 20), (*WRONG, FLIPS), strict=True)
    ]
    yield (
        "beside standard fine-tuning: {:+.1f}, {:+.1f}, {:+.1f} and {:+.1f} … {:+.1f} with pair",
        small,
    )
    yield (
        "FLOW with BatchNorm in evaluation mode kept {:+.1f} with 33 % wrong.",
        [kept["FLOW, BatchNorm fixed", WRONG[2]][0]],
    )
    anchor = {name: kept["output anchor", name][0] for name in CLEAN}
    yield (
        "**What else holds the old task where rows are right**: the output anchor kept {:+.1f} to "
        "{:+.1f} on three of four sets and {:+.1f} on digits.",
        [*span([anchor[name] for name in CLEAN if name != "digits"]), anchor["digits"]],
    )
    rivals = {**STRENGTHS, "fixed": ("standard, BatchNorm fixed",)}
    best = {
        kind: [
            max(kept[name, target] for name in rivals[kind])
            for target in ("fashion_mnist", "digits")
        ]
        for kind in ("ℓ2", "WiSE-FT", "fixed", "LoRA")
    }
    lora = best.pop("LoRA")
    assert all(sum(low > 0 for _, low, _ in of_kind) == 1 for of_kind in best.values())
    yield (
        "ℓ2 kept {:+.1f} and {:+.1f}, averaging (WiSE-FT) {:+.1f} and {:+.1f}, BatchNorm in "
        "evaluation mode while training {:+.1f} and {:+.1f}; each interval lies above 0 on one of "
        "the two. LoRA kept {:+.1f} and {:+.1f}.",
        [value for of_kind in (*best.values(), lora) for value, _, _ in of_kind],
    )
    at_rate = [-predicted["2, hardest tenth, at one rate", name][0] for name in (*CLEAN, RARE)]
    equal = [predicted["2, hardest tenth", name][0] for name in (*CLEAN, RARE)]
    yield (
        "**Hard rows pay at one rate**: on the new task's hardest tenth FLOW has {:.1f} to {:.1f} "
        "less on the sets with right rows. Where as much is learned in all it has {:+.1f} to "
        "{:+.1f}.",
        [*span(at_rate), *span(equal)],
    )
    yield (
        "**Where rows are wrong hard ones pay there, too**: {:+.1f} to {:+.1f} by FLOW, {:+.1f} to "
        "{:+.1f} by leaving out the true share",
        [end for values in hardest_of_wrong() for end in span(values)],
    )
    readouts = cells("batch_norm")
    standard, weighed = (
        readouts[f"{name}, 0.03", "fashion_mnist"] for name in ("standard", "FLOW")
    )
    yield (
        "**Much of what is forgotten at a large rate is BatchNorm's**: at 0.03 "
        "standard fine-tuning on Fashion-MNIST leaves {:.1f} % of "
        "CIFAR-10 right, with statistics taken anew {:.1f}, FLOW {:.1f} and {:.1f}.",
        [*standard[:2], *weighed[:2]],
    )
    anew = cells("batch_norm", 1)
    flow, held = (
        {name: anew[f"{method}, statistics anew", name] for name in (*CLEAN, *WRONG)}
        for method in ("FLOW", "output anchor")
    )
    yield (
        "With statistics taken anew differences at equal learning are smaller: FLOW's with "
        "10, 20 and 33 % wrong {:+.1f} "
        "({:+.1f} to {:+.1f}), {:+.1f} and {:+.1f}, on the clean sets {:+.1f} to {:+.1f}, the "
        "output anchor's there {:+.1f} to {:+.1f}",
        [
            *(*flow[WRONG[0]], flow[WRONG[1]][0], flow[WRONG[2]][0]),
            *span([flow[name][0] for name in CLEAN]),
            *span([held[name][0] for name in CLEAN]),
        ],
    )
    below = [below_the_best(cells("choices", number)) for number in range(2)]
    all_methods, standard = (
        {rule: [off for (name, _), off in of.items() if name == rule] for rule, _ in of}
        for of in below
    )
    better = list(above_all_rates())
    edges = zip(standard["smallest rate of all"], standard["linear probe"], strict=True)
    assert sum(min(off) <= 0.2 for off in edges) > len(better) / 2
    yield (
        "**Drift chooses well among standard fine-tuning's rates and no fine-tuning at all**, a "
        "new head alone: by inverted images at most {:.1f} below the best possible, validation "
        "alone {:.0f} to {:.0f}. The best is mostly the grid's edge: the smallest rate is {:.1f} "
        "to {:.1f} below it",
        [
            max(standard["by drift, inverted"]),
            *span(standard["blind"]),
            *span(standard["smallest rate of all"]),
        ],
    )
    yield "on {} of {} sets the new head alone lies above", [sum(better), len(better)]
    yield (
        "drift is at most {:.1f} below, validation {:.0f} to {:.0f}",
        [max(all_methods["by drift, inverted"]), *span(all_methods["blind"])],
    )


def hours():
    """How long all runs take, by two processes: those that were timed took so many seconds each."""
    registered = text(BENCHMARKS / "forgetting" / "registered_evidence.md")
    ((seconds, count, said),) = re.findall(
        r"took ([\d.]+) s each.* ([\d,]+) runs take ([\d.]+) hours so", registered
    )
    assert count == f"{num_runs():,}"
    whole = num_runs() * float(seconds) / 2 / 3600
    assert said == f"{whole:.1f}"
    return whole


def hardest_of_wrong():
    """The hardest tenth's differences by FLOW and by trimming at the true share."""
    hardest = cells("hard_samples", 1)
    shares = dict(zip((*WRONG, FLIPS), (10, 20, 33, 50, 20), strict=True))
    yield [hardest["FLOW, hardest tenth", name][0] for name in shares]
    yield [hardest[f"trimmed, {each}%, hardest tenth", name][0] for name, each in shares.items()]


def above_all_rates():
    """Whether the linear probe's average lies above that of every standard rate, for each set."""
    for path in PAGES.glob("forgetting_*.jsonl"):
        averages = {}
        for run in map(json.loads, path.read_text("utf-8").splitlines()):
            if "readouts" in run and run["method"] in ("standard", "linear probe"):
                scores = [*run["target"].values(), *run["retained"].values()]
                averages.setdefault(run["rate"], []).append(mean(scores))
        if averages:
            probe, *of_rates = (mean(averages[rate]) for rate in sorted(averages))
            yield probe > max(of_rates)


def test_what_is_registered_tells_of_the_outcome_that_changed():
    registered = text(BENCHMARKS / "forgetting" / "registered_evidence.md")
    low, high = outcomes()["3", FLIPS][1:]
    assert f"it holds again ({low:+.1f} to {high:+.1f})" in registered
    assert low < 0 < high


def test_every_figure_on_weights_is_one_of_the_pages():
    check_section(BENCHMARKS / "README.md", "When do weights help?", fragments(), SIZES)


def test_the_guide_on_vision_says_the_same_of_batch_norm():
    row = "standard, BatchNorm fixed"
    assert min(kept for (name, _), (kept, *_) in cells("evidence").items() if name == row) > 0
    said = "evaluation mode, with which plain fine-tuning kept as much of the old task or more"
    assert said in text(GUIDES / "vision.md")
    images, digits = (cells("evidence")[row, name][0] for name in CLEAN[:2])
    figures = f"{images:.1f} points more on Fashion-MNIST and {digits:.1f} points more on digits"
    assert figures in text(GUIDES / "vision.md")
