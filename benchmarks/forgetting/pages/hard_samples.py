"""The page that answers: who learns less, the hardest samples or all?

The new task's hardest tenth are the test samples with the largest loss before fine-tuning, and the
worst class is the one with the lowest accuracy after it. In the paper's Table 5 FLOW falls from
86.6 to 30.7 on the hardest tenth of CIFAR-10, at one rate for all methods.
"""

from __future__ import annotations

from statistics import mean

from benchmarks.forgetting.evidence import ANCHOR, FLOW, MEAN_WEIGHT
from benchmarks.forgetting.pages.fronts import at_equal_learning, signed_spread
from benchmarks.forgetting.pages.several import (
    Studies,
    counts,
    of_whole_seeds,
    table_by_rate,
    table_of_studies,
)
from flowdata.study import LINEAR_PROBE, STANDARD, Record

MEASURES = {
    "hardest tenth": "target of the hardest tenth",
    "worst class": "target of the worst class",
}


def hard_samples_page(studies: Studies) -> str:
    """Return a Markdown page on the accuracy on hard samples.

    Args:
        studies: the runs of each set.
    """
    studies = of_whole_seeds(studies)
    return "\n".join(
        [
            "# Who learns less: the hardest samples, or all?",
            "",
            f"CIFAR-10's ResNet-20 learns other images: {counts(studies)}. The new task's hardest "
            "tenth are the test images with the largest loss before fine-tuning, the worst class "
            "is the one with the lowest accuracy after it.",
            "",
            "At one rate, accuracy in %, means over the seeds: all test images / the hardest tenth "
            "/ the worst class.",
            "",
            *table_by_rate(studies, (LINEAR_PROBE, STANDARD, FLOW), _cell),
            "",
            "At equal learning, where a method has learned as much of all test images together: "
            "the difference from standard fine-tuning in points, mean ± standard deviation over "
            "the seeds.",
            "",
            *_at_equal_learning(studies),
            "",
        ]
    )


def _cell(runs: list[Record]) -> str:
    new = mean(mean(run["target"].values()) for run in runs)
    parts = (mean(run[name] for run in runs) for name in MEASURES.values())
    return " / ".join(f"{value:.1f}" for value in (new, *parts))


def _at_equal_learning(studies: Studies) -> list[str]:
    methods = dict.fromkeys(
        record["method"]
        for records in studies.values()
        for record in records
        if record["method"] in (FLOW, MEAN_WEIGHT, ANCHOR)
        or record["method"].startswith(("trimmed", "small losses"))
    )
    rows = [
        [f"{method}, {name}", *(_difference(records, method, key) for records in studies.values())]
        for name, key in MEASURES.items()
        for method in methods
    ]
    return table_of_studies("method, of", studies, rows)


def _difference(records: list[Record], method: str, key: str) -> str:
    if method not in {record["method"] for record in records}:
        return "–"
    return signed_spread(at_equal_learning(records, method, lambda record: float(record[key])))
