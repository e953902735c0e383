"""What benchmarks/README.md says of weights in language is what the pages say."""

import json
import re

from tests.result_pages import BENCHMARKS, RESULTS, check_section

SMALL, MIDDLE, LARGE = "0.0001", "0.0003", "0.001"
OF_STUDY, OF_DRIFT = (
    RESULTS / folder / "forgetting_evidence_language.md" for folder in ("evidence", "drift")
)


def differences(page):
    """By data, rate, method and text: the mean, and the ends of the interval."""
    cells = {}
    for part in page.read_text("utf-8").split("\n## ")[1:]:
        title, _, rest = part.partition("\n")
        data, rate = title.split(", at a rate of ")
        heading, _, *lines = [line for line in rest.splitlines() if line.startswith("| ")]
        heading = heading.strip("| ").split(" | ")
        assert heading[3::2][:2] == ["test difference", "WikiText-2 difference"]
        for line in lines:
            row = line.strip("| ").split(" | ")
            if row[0] == "prediction":
                break
            for name, cell in zip(("test", "WikiText-2"), (row[3], row[5]), strict=True):
                figures = [float(figure) for figure in re.findall(r"[+-]\d\.\d+", cell)]
                cells[data, rate, row[0], name] = figures
    return cells


def fragments():
    study, others = differences(OF_STUDY), differences(OF_DRIFT)

    def of_noise(method, name="test"):
        return study["noisy", SMALL, method, name]

    assert max(of_noise("FLOW")) < 0
    yield "*noise*, 128 rows, {}; *rules*, 1,000 rows as they are, {}.", [*num_seeds()]
    yield (
        "**A third of the answers shuffled: FLOW learns more, by little.** {:+.3f} ({:+.3f} to "
        "{:+.3f}) on test answers, {:+.3f} ({:+.3f} to {:+.3f}) on WikiText-2,… has {:+.3f} and "
        "{:+.3f}: standard fine-tuning forgets nothing there.",
        [
            *of_noise("FLOW"),
            *of_noise("FLOW", "WikiText-2"),
            of_noise("pre-trained")[0],
            of_noise("pre-trained", "WikiText-2")[0],
        ],
    )
    rivals = ("trimmed, 33%", "clean rows alone")
    yield (
        "as well on test answers, {:+.3f}, … that nobody has, {:+.3f}; … {:+.3f} and {:+.3f}.",
        [of_noise(rival, name)[0] for name in ("test", "WikiText-2") for rival in rivals],
    )
    assert max(map(abs, of_noise("standard, smaller steps"))) < 0.002
    yield (
        "Every row at FLOW's mean weight does as standard fine-tuning does, {:+.3f}: AdamW",
        of_noise("standard, smaller steps")[:1],
    )

    def of_rules(method, name="test"):
        return study["gsm8k", SMALL, method, name]

    assert of_rules("FLOW")[1] > 0
    yield (
        "**GSM8K alone: weights cost a little, or nothing**: {:+.3f} ({:+.3f} to {:+.3f}) on test "
        "answers with 1,000 rows, {:+.3f} ({:+.3f} to {:+.3f})",
        [*of_rules("FLOW"), *of_rules("FLOW", "WikiText-2")],
    )
    alone, mixed = (
        [*others[data, SMALL, "FLOW", "test"], others[data, SMALL, "FLOW", "WikiText-2"][0]]
        for data in ("gsm8k", "mixed")
    )
    yield (
        "with 48 rows {:+.3f} ({:+.3f} to {:+.3f}) and {:+.3f}",
        alone,
    )
    larger = [others["mixed", rate, "FLOW", "test"][0] for rate in (MIDDLE, LARGE)]
    yield (
        "{:+.3f} ({:+.3f} to {:+.3f}) and {:+.3f} at 1e-4, … less, {:+.3f} and {:+.3f}.",
        [*mixed, *larger],
    )
    yield (
        "WikiText-2's loss by {:.3f}. … takes {:.3f} of that back, and learns more, {:+.3f}.",
        [
            -others["gsm8k", LARGE, "pre-trained", "WikiText-2"][0],
            -others["gsm8k", LARGE, "WiSE-FT", "WikiText-2"][0],
            others["gsm8k", LARGE, "WiSE-FT", "test"][0],
        ],
    )
    data = ("gsm8k", "mixed", "noisy")
    raised = [others[each, SMALL, rule, "test"][0] for each in data for rule in ("DFT", "TALR")]
    lowered = [others[each, SMALL, "pre-trained", "test"][0] for each in data]
    assert min(raised) > max(lowered)  # which is worse than no fine-tuning
    yield (
        "by {:.3f} to {:.3f}, where fine-tuning had lowered it by {:.3f} to {:.3f}.",
        [min(raised), max(raised), min(lowered), max(lowered)],
    )
    rules = ("TALR", "DFT", "ASFT", "EAFT")
    assert min(of_rules(rule)[1] for rule in rules) > 0  # each interval lies above 0
    yield (
        "**Weights from the current model's own losses** raise the loss of test answers, with "
        "1,000 rows by {:.3f} (TALR), {:.3f} (DFT), {:.3f} (ASFT) and {:.3f} (EAFT), as was "
        "predicted;",
        [of_rules(rule)[0] for rule in rules],
    )
    drift = column(OF_STUDY, "gsm8k", "KL on own text")
    assert max(drift["EAFT"], drift["ASFT"]) < drift["standard"] < min(drift["TALR"], drift["DFT"])
    yield (
        "{:.3f} and {:.3f} (TALR, DFT) beside {:.3f}; EAFT has {:.3f}, and ASFT, … model, {:.3f}: "
        "less, against the prediction.",
        [drift[rule] for rule in ("TALR", "DFT", "standard", "EAFT", "ASFT")],
    )
    answers = column(OF_STUDY, "gsm8k", "right answers, %").values()
    yield "all have {:.1f} to {:.1f} % of the answers right", [min(answers), max(answers)]
    orders = re.findall(r"of this one rate: own text (\d\.\d+)", OF_STUDY.read_text("utf-8"))
    yield "coefficient of {} with WikiText-2's loss in *noise*, {} in *rules*", orders


def num_seeds():
    """How many seeds each of the two studies has, in words."""
    words = {2: "two seeds", 8: "eight seeds"}
    for study in ("noise", "rules"):
        runs = (OF_STUDY.parent / f"forgetting_language_{study}.jsonl").read_text("utf-8")
        yield words[len({json.loads(line)["seed"] for line in runs.splitlines()})]


def column(page, data, name):
    """A column of a page's table on some data, by method."""
    part = page.read_text("utf-8").partition(f"## {data}, ")[2].partition("\n## ")[0]
    heading, _, *rows = [line.strip("| ").split(" | ") for line in part.splitlines() if "|" in line]
    place = heading.index(name)
    return {row[0]: float(row[place]) for row in rows if len(row) == len(heading)}


def test_every_figure_on_language_is_one_of_the_pages():
    check_section(
        BENCHMARKS / "README.md",
        "Language",
        fragments(),
        ("95 % of the draws", "at 1e-4", "at 1e-3", "128 rows", "1,000 rows", "with 48 rows"),
    )
